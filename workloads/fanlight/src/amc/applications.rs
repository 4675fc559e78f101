//! `fanlight application …`

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use fanlight_client::AmsClient;
use reqwest::Method;
use serde_json::{Value, json};

use super::{
    archive::Package,
    cli::{ApplicationCommand, ApplicationVersion},
    failure::Usage,
    output::{self, Column, cell, confirm, note},
    progress::follow,
    remotes::client,
};

const APPLICATIONS: &str = "/1.0/applications";
/// Lists in the body of a change.
const LISTS: [&str; 5] = ["tags", "addons", "node_selector", "features", "required_permissions"];
/// Texts in it.
const TEXTS: [&str; 5] = ["image", "instance-type", "boot_activity", "video_encoder", "manifest_version"];
/// Resources that are numbers.
const NUMBERS: [&str; 3] = ["cpus", "gpu-slots", "vpu-slots"];

const COLUMNS: &[Column] = &[
    ("ID", |application| cell(application, "/id")),
    ("NAME", |application| cell(application, "/name")),
    ("STATUS", |application| cell(application, "/status")),
    ("PUBLISHED", |application| cell(application, "/published")),
    ("VERSIONS", |application| {
        let versions = application["versions"].as_array().map(Vec::as_slice).unwrap_or_default();
        versions.iter().map(|version| cell(version, "/number")).collect::<Vec<_>>().join(",")
    }),
    ("IMAGE", |application| cell(application, "/parent_image_id")),
    ("TAGS", |application| cell(application, "/tags")),
    ("CREATED", |application| output::time(application, "/created_at")),
];

/// `fanlight application …`
///
/// # Errors
/// As AMS says; or a package cannot be read.
pub async fn application(command: ApplicationCommand) -> Result<()> {
    match command {
        ApplicationCommand::Ls(options) => {
            let filters =
                options.filters.iter().map(|(key, value)| filter(key, value)).collect::<Result<Vec<_>>>()?;
            let ams = client(&options.list.target)?;
            let found = ams.objects(APPLICATIONS, &filters).await.context("listing the applications")?;
            output::list(options.list.output.format, &found, COLUMNS)
        }
        ApplicationCommand::Show(options) => {
            let ams = client(&options.target)?;
            let found = ams.object(APPLICATIONS, &options.name).await.context("showing the application")?;
            output::object(options.output.format, &found)
        }
        ApplicationCommand::Create { target, path, patience } => {
            let package = Package::of(&path)?;
            let ams = client(&target)?;
            let doing = format!("making an application of {}", path.display());
            let operation = ams
                .send_file(Method::POST, APPLICATIONS, None::<&()>, package.path())
                .await
                .with_context(|| doing.clone())?;
            if let Some(id) = operation.resource("applications") {
                output::print(&format!("{id}\n"))?;
            }
            follow(&ams, &operation, &doing, &patience).await
        }
        ApplicationCommand::Update { target, application, path, patience } => {
            let package = path.as_deref().map(Package::of).transpose()?;
            let ams = client(&target)?;
            let doing = format!("updating application {application}");
            let operation = match &package {
                Some(package) => {
                    let path = format!(
                        "{APPLICATIONS}/{}",
                        ams.application(&application).await.context("finding the application")?.id
                    );
                    ams.send_file(Method::PATCH, &path, None::<&()>, package.path()).await
                }
                None => ams.refresh_application(&application).await,
            };
            follow(&ams, &operation.with_context(|| doing.clone())?, &doing, &patience).await
        }
        ApplicationCommand::Set { target, application, key, value, patience } => {
            let change = change(&key, &value)?;
            let ams = client(&target)?;
            let doing = format!("changing application {application}");
            let operation =
                ams.patch(APPLICATIONS, &application, &change).await.with_context(|| doing.clone())?;
            follow(&ams, &operation, &doing, &patience).await
        }
        ApplicationCommand::Publish(options) => publish(options, true).await,
        ApplicationCommand::Revoke(options) => publish(options, false).await,
        ApplicationCommand::Delete { target, application, version, force, yes, patience } => {
            let ams = client(&target)?;
            let what = match version {
                Some(version) => format!("version {version} of application {application}"),
                None => format!("application {application}"),
            };
            confirm(&format!("Delete {what} of {}?", ams.endpoint().name()), yes || !asks())?;
            let operation = match version {
                Some(version) => ams.remove_version(APPLICATIONS, &application, version, force).await,
                None => ams.delete_application(&application, force).await,
            };
            let doing = format!("deleting {what}");
            follow(&ams, &operation.with_context(|| doing.clone())?, &doing, &patience).await
        }
        ApplicationCommand::Export { target, application, version, file } => {
            let ams = client(&target)?;
            export(&ams, &application, version, file).await
        }
        ApplicationCommand::Manifest { target, application, version } => {
            let ams = client(&target)?;
            let text = match version {
                Some(version) => ams.version_manifest(&application, version).await,
                None => ams.application_manifest(&application).await,
            };
            output::print_bytes(&text.context("reading the manifest")?)
        }
    }
}

/// Whether a person is there to be asked before one object is deleted; scripts name what they mean.
pub fn asks() -> bool {
    use std::io::IsTerminal as _;
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

async fn publish(options: ApplicationVersion, published: bool) -> Result<()> {
    let ams = client(&options.target)?;
    let verb = if published { "publishing" } else { "revoking" };
    let doing = format!("{verb} version {} of application {}", options.version, options.application);
    let operation = ams.publish_application(&options.application, options.version, published).await;
    follow(&ams, &operation.with_context(|| doing.clone())?, &doing, &options.patience).await
}

async fn export(ams: &AmsClient, name: &str, version: u32, file: Option<std::path::PathBuf>) -> Result<()> {
    let doing = || format!("exporting version {version} of application {name}");
    let damaged = || anyhow::anyhow!("what came is not what the server has; try again").context(doing());
    let file = file.unwrap_or_else(|| format!("{name}-{version}.tar.bz2").into());
    if file.as_os_str() == "-" {
        let mut out = tokio::io::stdout();
        return if ams.export_application(name, version, &mut out).await.with_context(doing)? {
            Ok(())
        } else {
            Err(damaged())
        };
    }
    // Beside its place, so that half a package is never taken for a whole one.
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(".".as_ref());
    let part = tempfile::NamedTempFile::new_in(folder)
        .with_context(|| format!("writing into {}", folder.display()))?;
    let mut sink = tokio::fs::File::from_std(part.reopen().context("opening the file")?);
    if !ams.export_application(name, version, &mut sink).await.with_context(doing)? {
        return Err(damaged());
    }
    sink.sync_all().await.context("writing the package")?;
    part.persist(&file).with_context(|| format!("writing {}", file.display()))?;
    note(&format!("{}", file.display()));
    Ok(())
}

/// A filter as the server has it; names of the original's command line are not those of its API (ams-api section 15).
fn filter(key: &str, value: &str) -> Result<(&'static str, String)> {
    const KNOWN: [&str; 13] = [
        "id",
        "name",
        "instance_type",
        "status",
        "boot_package",
        "immutable",
        "inhibit_auto_updates",
        "published",
        "addons",
        "abi",
        "tags",
        "vm",
        "parent_image_variant",
    ];
    let name = match key {
        "tag" => "tags",
        "addon" => "addons",
        "instance-type" => "instance_type",
        other => other,
    };
    match KNOWN.iter().find(|known| **known == name) {
        Some(known) => Ok((*known, value.into())),
        None => {
            Err(Usage(format!("applications cannot be filtered by {key:?}; known are {}", KNOWN.join(", ")))
                .into())
        }
    }
}

/// The body that sets one thing.
fn change(key: &str, value: &str) -> Result<BTreeMap<String, Value>> {
    let list = || value.split(',').map(str::trim).filter(|word| !word.is_empty()).collect::<Vec<_>>();
    let wrong = |expected: &str| Usage(format!("{key} is {value:?}; expected {expected}"));
    let truth = || value.parse::<bool>().map_err(|_| wrong("true or false"));
    let number = || value.parse::<i64>().map_err(|_| wrong("a whole number"));
    let under = |part: &str, value: Value| json!({ part: value });
    let (name, value) = match key.split_once('.') {
        Some(("resources", part)) if NUMBERS.contains(&part) => ("resources", under(part, number()?.into())),
        Some(("resources", part @ ("memory" | "disk-size" | "gpu-type"))) => {
            ("resources", under(part, value.into()))
        }
        Some(("watchdog", "disabled")) => ("watchdog", under("disabled", truth()?.into())),
        Some(("watchdog", part @ "allowed-packages")) => ("watchdog", under(part, list().into())),
        Some(("hooks", part @ "timeout")) => ("hooks", under(part, value.into())),
        Some(("bootstrap", part @ "keep")) => ("bootstrap", under(part, list().into())),
        Some(("pool", part @ "size")) => ("pool", under(part, number()?.into())),
        Some(("pool", part @ "start")) => ("pool", under(part, value.into())),
        None if key == "inhibit_auto_updates" => (key, truth()?.into()),
        None if LISTS.contains(&key) => (key, list().into()),
        None if TEXTS.contains(&key) => (key, value.into()),
        _ => bail!(Usage(format!(
            "an application has no setting {key:?}; known are inhibit_auto_updates, {}, {}, resources.cpus, \
             resources.memory, resources.disk-size, resources.gpu-slots, resources.gpu-type, resources.vpu-slots, \
             watchdog.disabled, watchdog.allowed-packages, hooks.timeout, bootstrap.keep, pool.size, pool.start",
            LISTS.join(", "),
            TEXTS.join(", ")
        ))),
    };
    Ok(BTreeMap::from([(name.to_owned(), value)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_become_the_members_that_the_api_has() {
        for (key, value, expected) in [
            ("tags", "a, b", json!({"tags": ["a", "b"]})),
            ("tags", "", json!({"tags": []})),
            ("inhibit_auto_updates", "true", json!({"inhibit_auto_updates": true})),
            ("image", "base", json!({"image": "base"})),
            ("resources.cpus", "4", json!({"resources": {"cpus": 4}})),
            ("resources.memory", "3GB", json!({"resources": {"memory": "3GB"}})),
            ("pool.size", "2", json!({"pool": {"size": 2}})),
            ("watchdog.disabled", "false", json!({"watchdog": {"disabled": false}})),
        ] {
            assert_eq!(serde_json::to_value(change(key, value).expect(key)).expect("an object"), expected);
        }
        for (key, value) in [
            ("colour", "red"),
            ("resources.colour", "1"),
            ("resources.cpus", "many"),
            ("inhibit_auto_updates", "si"),
        ] {
            let error = change(key, value).expect_err(key);
            assert!(error.is::<Usage>() && error.to_string().contains(key), "{error}");
        }
    }

    #[test]
    fn filters_are_those_of_the_api() {
        assert_eq!(filter("tag", "a").expect("known"), ("tags", "a".into()));
        assert!(filter("colour", "red").expect_err("unknown").is::<Usage>());
    }
}
