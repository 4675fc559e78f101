//! `fanlight ams …`: AMS itself.

use std::io::Read as _;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{
    cli::{AmsCommand, AmsConfigCommand, Format},
    failure::NotFound,
    output::{self, Column, cell},
    progress::follow,
    remotes::client,
};

const OPERATION_COLUMNS: &[Column] = &[
    ("ID", |operation| cell(operation, "/id")),
    ("STATUS", |operation| cell(operation, "/status")),
    ("DESCRIPTION", |operation| cell(operation, "/description")),
    ("CREATED", |operation| cell(operation, "/created_at")),
    ("RESOURCES", |operation| {
        let lists = operation["resources"].as_object().into_iter().flat_map(|map| map.values());
        lists
            .flat_map(|list| list.as_array().into_iter().flatten())
            .filter_map(Value::as_str)
            .collect::<Vec<_>>()
            .join(",")
    }),
    ("ERROR", |operation| cell(operation, "/err")),
];
const TASK_COLUMNS: &[Column] = &[
    ("ID", |task| cell(task, "/id")),
    ("STATUS", |task| cell(task, "/status")),
    ("OBJECT", |task| cell(task, "/object_id")),
    ("TYPE", |task| cell(task, "/object_type")),
];

/// `fanlight ams …`
///
/// # Errors
/// As AMS says.
pub async fn ams(command: AmsCommand) -> Result<()> {
    match command {
        AmsCommand::Info(options) => {
            let ams = client(&options.target)?;
            let mut info = ams.value("/1.0").await.context("asking what AMS is")?;
            let version = ams.version().await.context("asking for the version")?.version;
            if let Value::Object(map) = &mut info {
                map.insert("version".into(), version.into());
                // Long, and the same everywhere.
                if options.output.format == Format::Table {
                    map.remove("auth_permissions");
                }
            }
            output::object(options.output.format, &info)
        }
        AmsCommand::Config { command } => config(command).await,
        AmsCommand::Operations(options) => {
            let ams = client(&options.target)?;
            let by_status =
                ams.value("/1.0/operations?recursion=1").await.context("listing the operations")?;
            let mut operations: Vec<Value> = match by_status {
                Value::Object(map) => {
                    map.into_iter().filter_map(|(_, list)| list.as_array().cloned()).flatten().collect()
                }
                _ => Vec::new(),
            };
            operations.sort_by_key(|operation| cell(operation, "/created_at"));
            output::list(options.output.format, &operations, OPERATION_COLUMNS)
        }
        AmsCommand::Cancel { target, operation } => {
            let id = operation.parse().context("reading the id of the operation")?;
            client(&target)?.cancel(&id).await.context("cancelling the operation")
        }
        AmsCommand::Tasks(options) => {
            let ams = client(&options.target)?;
            let tasks = ams.objects("/1.0/tasks", &[]).await.context("listing the tasks")?;
            output::list(options.output.format, &tasks, TASK_COLUMNS)
        }
    }
}

async fn config(command: AmsConfigCommand) -> Result<()> {
    match command {
        AmsConfigCommand::Show { target, name, output } => {
            let ams = client(&target)?;
            let items = ams.config().await.context("reading the configuration")?;
            if let Some(name) = name {
                let Some(value) = items.get(&name) else {
                    return Err(NotFound(format!(
                        "AMS has no setting {name:?}; without a name all are printed"
                    ))
                    .into());
                };
                return match output.format {
                    Format::Table => {
                        output::print(&format!("{}\n", cell(&json!({ "value": value }), "/value")))
                    }
                    other => output::document(other, value),
                };
            }
            match output.format {
                // Names hold dots, so they are rows and not paths.
                Format::Table => {
                    let rows: Vec<Value> =
                        items.iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
                    let columns: &[Column] =
                        &[("NAME", |row| cell(row, "/name")), ("VALUE", |row| cell(row, "/value"))];
                    output::list(Format::Table, &rows, columns)
                }
                other => output::document(other, &items),
            }
        }
        AmsConfigCommand::Set { target, name, value, patience } => {
            let value = if value == "-" { from_input()? } else { value };
            let ams = client(&target)?;
            let doing = format!("changing {name}");
            let operation = ams.set_config(&name, &value).await.with_context(|| doing.clone())?;
            follow(&ams, &operation, &doing, &patience).await
        }
    }
}

/// Secrets do not belong among arguments, which others can read.
fn from_input() -> Result<String> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("reading the value from standard input")?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}
