//! `fanlight image …`: the images that AMS has. Making one of packages is another module's business.

use anyhow::{Context as _, Result};
use fanlight_api::ams::images::{ImagePatch, ImageSource, ImagesPost};
use serde_json::Value;

use super::{
    applications::asks,
    cli::{ImageCommand, OneImage},
    image_build,
    output::{self, Column, cell, confirm},
    progress::follow,
    remotes::client,
};

const IMAGES: &str = "/1.0/images";

const COLUMNS: &[Column] = &[
    ("ID", |image| cell(image, "/id")),
    ("NAME", |image| cell(image, "/name")),
    ("STATUS", |image| cell(image, "/status")),
    ("DEFAULT", |image| if image["default"] == true { "yes".into() } else { String::new() }),
    ("VERSIONS", |image| image["versions"].as_array().map_or(0, Vec::len).to_string()),
    ("SIZE", |image| newest(image, "size")),
    ("ARCHITECTURE", |image| cell(image, "/architecture")),
    ("USED BY", |image| image["used_by"].as_array().map_or(0, Vec::len).to_string()),
];

/// A member of the newest version; sizes for people.
fn newest(image: &Value, member: &str) -> String {
    let version = image["versions"].as_array().and_then(|versions| versions.last());
    let Some(size) = version.and_then(|version| version[member].as_u64()).filter(|size| *size > 0) else {
        return String::new();
    };
    format!("{:.1}MB", size as f64 / 1e6)
}

/// `fanlight image …`
///
/// # Errors
/// As AMS says; or a file cannot be read.
pub async fn image(command: ImageCommand) -> Result<()> {
    match command {
        ImageCommand::Build(options) => tokio::task::spawn_blocking(move || image_build::build(&options))
            .await
            .context("building the image")?
            .context("building the image"),
        ImageCommand::Ls(options) => {
            let ams = client(&options.target)?;
            let images = ams.objects(IMAGES, &[]).await.context("listing the images")?;
            output::list(options.output.format, &images, COLUMNS)
        }
        ImageCommand::Show(options) => {
            let ams = client(&options.target)?;
            let image = ams.object(IMAGES, &options.name).await.context("showing the image")?;
            output::object(options.output.format, &image)
        }
        ImageCommand::Add { target, name, file, from, instance, force, default, patience } => {
            let ams = client(&target)?;
            let doing = format!("adding image {name}");
            let source = instance.map(|instance| ImageSource { kind: "instance".into(), instance, force });
            let request =
                ImagesPost { name, path: from.unwrap_or_default(), default, source, ..ImagesPost::default() };
            let operation = match file {
                Some(file) => ams.upload_image(&request, &file).await,
                None => ams.import_image(&request).await,
            };
            let operation = operation.with_context(|| doing.clone())?;
            if let Some(id) = operation.resource("images") {
                output::print(&format!("{id}\n"))?;
            }
            follow(&ams, &operation, &doing, &patience).await
        }
        ImageCommand::Update { target, image, file, patience } => {
            let ams = client(&target)?;
            let doing = format!("updating image {image}");
            let operation = ams.update_image(&image, &file).await.with_context(|| doing.clone())?;
            follow(&ams, &operation, &doing, &patience).await
        }
        ImageCommand::Switch(options) => {
            let patch = ImagePatch { default: Some(true), force_sync: false };
            change(options, "making the default of", &patch).await
        }
        ImageCommand::Sync(options) => {
            let patch = ImagePatch { default: None, force_sync: true };
            change(options, "looking for a newer release of", &patch).await
        }
        ImageCommand::Delete { target, image, version, force, yes, patience } => {
            let ams = client(&target)?;
            let what = match version {
                Some(version) => format!("version {version} of image {image}"),
                None => format!("image {image}"),
            };
            confirm(&format!("Delete {what} of {}?", ams.endpoint().name()), yes || !asks())?;
            let operation = match version {
                Some(version) => ams.remove_version(IMAGES, &image, version, force).await,
                None => ams.remove(IMAGES, &image, force).await,
            };
            let doing = format!("deleting {what}");
            follow(&ams, &operation.with_context(|| doing.clone())?, &doing, &patience).await
        }
    }
}

async fn change(options: OneImage, doing: &str, patch: &ImagePatch) -> Result<()> {
    let ams = client(&options.target)?;
    let doing = format!("{doing} image {}", options.image);
    let operation = ams.patch_image(&options.image, patch).await.with_context(|| doing.clone())?;
    follow(&ams, &operation, &doing, &options.patience).await
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_size_of_an_image_is_that_of_its_newest_version() {
        let image = json!({"versions": [{"size": 1}, {"size": 123_456_789}]});
        assert_eq!(newest(&image, "size"), "123.5MB");
        assert_eq!(newest(&json!({"versions": null}), "size"), "");
        assert_eq!(newest(&json!({"versions": [{"size": 0}]}), "size"), "");
    }
}
