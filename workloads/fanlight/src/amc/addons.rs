//! `fanlight addon …`

use anyhow::{Context as _, Result};
use fanlight_api::ams::Operation;
use fanlight_client::AmsClient;
use reqwest::Method;
use serde_json::json;

use super::{
    applications::asks,
    archive::Package,
    cli::{AddonCommand, AddonFile},
    output::{self, Column, cell, confirm},
    progress::follow,
    remotes::client,
};

const ADDONS: &str = "/1.0/addons";

const COLUMNS: &[Column] = &[
    ("NAME", |addon| cell(addon, "/name")),
    ("VERSIONS", |addon| {
        let versions = addon["versions"].as_array().map(Vec::as_slice).unwrap_or_default();
        versions.iter().map(|version| cell(version, "/version")).collect::<Vec<_>>().join(",")
    }),
    ("USED BY", |addon| cell(addon, "/used_by")),
];

/// `fanlight addon …`
///
/// # Errors
/// As AMS says; or a package cannot be read.
pub async fn addon(command: AddonCommand) -> Result<()> {
    match command {
        AddonCommand::Ls(options) => {
            let ams = client(&options.target)?;
            let addons = ams.objects(ADDONS, &[]).await.context("listing the addons")?;
            output::list(options.output.format, &addons, COLUMNS)
        }
        AddonCommand::Show(options) => {
            let ams = client(&options.target)?;
            let addon = ams.object(ADDONS, &options.name).await.context("showing the addon")?;
            output::object(options.output.format, &addon)
        }
        AddonCommand::Add(options) => {
            let request = json!({ "name": options.name });
            send(options, "adding", async |ams, package| {
                Ok(ams.send_file(Method::POST, ADDONS, Some(&request), package.path()).await?)
            })
            .await
        }
        AddonCommand::Update(options) => {
            let name = options.name.clone();
            send(options, "updating", async |ams, package| {
                // Looked for before a package is sent that nobody takes.
                ams.object(ADDONS, &name).await?;
                Ok(ams.update_with_file(ADDONS, &name, package.path()).await?)
            })
            .await
        }
        AddonCommand::Delete { target, name, version, yes, patience } => {
            let ams = client(&target)?;
            let what = match version {
                Some(version) => format!("version {version} of addon {name}"),
                None => format!("addon {name}"),
            };
            confirm(&format!("Delete {what} of {}?", ams.endpoint().name()), yes || !asks())?;
            let operation = match version {
                Some(version) => ams.remove_version(ADDONS, &name, version, false).await,
                None => ams.remove(ADDONS, &name, false).await,
            };
            let doing = format!("deleting {what}");
            follow(&ams, &operation.with_context(|| doing.clone())?, &doing, &patience).await
        }
    }
}

async fn send(
    options: AddonFile,
    verb: &str,
    act: impl AsyncFnOnce(&AmsClient, &Package) -> Result<Operation>,
) -> Result<()> {
    let package = Package::of(&options.path)?;
    let ams = client(&options.target)?;
    let doing = format!("{verb} addon {}", options.name);
    let operation = act(&ams, &package).await.with_context(|| doing.clone())?;
    follow(&ams, &operation, &doing, &options.patience).await
}
