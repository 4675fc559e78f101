//! `fanlight doctor`: walks the path that a stream takes, step by step from here, and names the one that is broken.
//!
//! Looking ([`gather`], [`ice`]) and judging ([`judge`]) are apart; what the gateway sees on its side it says itself.

mod gather;
mod ice;
mod judge;

use std::{fmt::Write as _, path::Path};

use anyhow::{Context, Result, bail};
use fanlight_api::{
    Secret,
    gateway::{Check, CheckStatus},
};
use gather::Target;
use serde::Serialize;

use crate::{
    cli::Doctor,
    environment,
    state::{State, read_optional},
};

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    checks: Vec<Check>,
}

/// `fanlight doctor`
///
/// # Errors
/// A step is broken; or it could not be found out where to look.
pub async fn run(options: &Doctor) -> Result<()> {
    let facts = gather::gather(&target(options)?).await?;
    let report = Report { checks: judge::checks(&facts) };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report).context("writing the report")?);
    } else {
        print!("{}", render(&report.checks));
    }
    match report.checks.iter().find(|check| check.status == CheckStatus::Failed) {
        None => Ok(()),
        Some(check) => bail!("a stream does not get past the step `{}`: {}", check.step, check.text),
    }
}

/// Where to look: at the gateway of a state folder, or at one by its address.
fn target(options: &Doctor) -> Result<Target> {
    let (url, found, ca, looked) = match &options.url {
        Some(url) => {
            let token = std::env::var("FANLIGHT_TOKEN").ok();
            let ca = std::env::var_os("FANLIGHT_CA").map(Into::into);
            (
                url.clone(),
                token,
                ca,
                "name a file that holds one with --token-file, or set FANLIGHT_TOKEN".to_owned(),
            )
        }
        None => {
            let folder = &options.stack.state;
            let advice = "start one with `fanlight up`, name it with --state, or name a gateway with --url";
            if !folder.is_dir() {
                bail!("{} is no state folder of a stack; {advice}", folder.display());
            }
            let file = State::open(folder)?.env();
            let variables = environment::read(&file)?
                .with_context(|| format!("no stack has ever run from {}; {advice}", folder.display()))?;
            let get = |name: &str| variables.get(name).filter(|value| !value.is_empty()).cloned();
            let url = get("FANLIGHT_GATEWAY_URL")
                .with_context(|| format!("{} does not say where the gateway is", file.display()))?;
            let looked = format!("{} holds none", file.display());
            (url, get("FANLIGHT_TOKEN"), get("FANLIGHT_CA").map(Into::into), looked)
        }
    };
    let token = match &options.token_file {
        Some(file) => read_token(file)?,
        None => found.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()).ok_or(looked),
    };
    Ok(Target {
        url,
        own_stack: options.url.is_none(),
        token: token.map(Secret::new),
        ca: options.ca.clone().or(ca),
        region: options.region.clone(),
        application: options.app.clone(),
    })
}

/// The token in a file; a file without one is a finding, a file that is not there a mistake in the command.
fn read_token(file: &Path) -> Result<Result<String, String>> {
    let text = read_optional(file)?.with_context(|| format!("there is no file {}", file.display()))?;
    let text = text.trim();
    Ok(if text.is_empty() { Err(format!("{} is empty", file.display())) } else { Ok(text.to_owned()) })
}

/// One line a step, with the advice below it.
fn render(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.step.chars().count()).max().unwrap_or_default();
    let mut text = String::new();
    for check in checks {
        let mark = match check.status {
            CheckStatus::Ok => "✓",
            CheckStatus::Skipped => "–",
            CheckStatus::Warning => "!",
            CheckStatus::Failed => "✗",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{mark} {:width$}  {}", check.step, check.text);
        if !check.advice.is_empty() {
            let _ = writeln!(text, "  {:width$}  → {}", "", check.advice);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_a_line_with_its_advice_below() {
        let check = |step: &str, status, advice: &str| Check {
            step: step.into(),
            status,
            text: "seen".into(),
            advice: advice.into(),
        };
        let text = render(&[
            check("connect", CheckStatus::Ok, ""),
            check("udp", CheckStatus::Warning, "do this"),
            check("relay", CheckStatus::Failed, "do that"),
            check("application", CheckStatus::Skipped, ""),
        ]);
        assert_eq!(
            text,
            "✓ connect      seen\n\
             ! udp          seen\n               → do this\n\
             ✗ relay        seen\n               → do that\n\
             – application  seen\n"
        );
    }
}
