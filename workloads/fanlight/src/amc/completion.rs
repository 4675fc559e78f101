//! Completion for shells: of commands and options, and of the names of what there is.
//!
//! A shell waits while a person has the finger on the key: whoever does not answer within a moment has no names.

use std::{ffi::OsStr, io::Write as _, time::Duration};

use anyhow::{Context as _, Result};
use clap_complete::{CompletionCandidate, env::Shells};
use fanlight_client::AmsClient;
use serde_json::Value;

use super::{
    cli::Target,
    output::{self, cell},
    remotes,
};

/// How long names are waited for.
const MOMENT: Duration = Duration::from_millis(700);
/// The variable by which the shell's script asks for candidates.
pub const VARIABLE: &str = "COMPLETE";

/// `fanlight completion`: prints what a shell must read once.
///
/// # Errors
/// The script cannot be written.
pub fn script(shell: &str) -> Result<()> {
    let shells = Shells::builtins();
    let completer = shells.completer(shell).with_context(|| format!("{shell} is not known"))?;
    let mut script = Vec::new();
    completer
        .write_registration(VARIABLE, "fanlight", "fanlight", "fanlight", &mut script)
        .context("writing the script")?;
    script.flush().context("writing the script")?;
    output::print_bytes(&script)
}

/// Names of remotes.
pub fn remotes() -> Vec<CompletionCandidate> {
    remotes::names().into_iter().map(CompletionCandidate::new).collect()
}

/// Names of instances, with what runs in them.
pub fn instances() -> Vec<CompletionCandidate> {
    names("/1.0/instances", |instance| {
        format!("{} {}", cell(instance, "/app_name"), cell(instance, "/status"))
    })
}

/// Names of applications.
pub fn applications() -> Vec<CompletionCandidate> {
    names("/1.0/applications", |application| cell(application, "/title"))
}

/// Names of images.
pub fn images() -> Vec<CompletionCandidate> {
    names("/1.0/images", |image| cell(image, "/status"))
}

/// Names of nodes.
pub fn nodes() -> Vec<CompletionCandidate> {
    names("/1.0/nodes", |node| cell(node, "/status"))
}

fn names(collection: &str, about: fn(&Value) -> String) -> Vec<CompletionCandidate> {
    let found = ask(collection).unwrap_or_default();
    found
        .iter()
        .map(|object| CompletionCandidate::new(cell(object, "/name")).help(Some(about(object).into())))
        .collect()
}

/// The objects of a collection of the AMS that a command would ask; none where anything is amiss.
fn ask(collection: &str) -> Option<Vec<Value>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    fanlight_service::tls::install_provider();
    let found = runtime.block_on(async {
        let ams: AmsClient = remotes::client(&typed()).ok()?;
        tokio::time::timeout(MOMENT, ams.objects(collection, &[])).await.ok()?.ok()
    });
    runtime.shutdown_background();
    found
}

/// The AMS that is meant by what is typed so far, which the parser has not seen whole.
fn typed() -> Target {
    let words: Vec<_> = std::env::args_os().skip_while(|word| word != OsStr::new("--")).skip(1).collect();
    let mut target = Target {
        remote: std::env::var("FANLIGHT_REMOTE").ok(),
        state: std::env::var_os("FANLIGHT_STATE").map(Into::into),
    };
    for pair in words.windows(2) {
        match pair[0].to_str() {
            Some("--remote") => target.remote = pair[1].to_str().map(str::to_owned),
            Some("--state") => target.state = Some(pair[1].clone().into()),
            _ => {}
        }
    }
    target
}
