//! `fanlight share` and `fanlight config`: what an operator does with a gateway that runs.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use fanlight_api::{
    SessionId, ShareId,
    gateway::{SharePatch, SharePost},
};

use crate::{
    cli::{ConfigCommand, ShareCommand},
    commands::gateway,
};

/// `fanlight share …`
///
/// # Errors
/// As the gateway says.
pub async fn share(command: ShareCommand) -> Result<()> {
    match command {
        ShareCommand::Create { stack, session, description, expiry } => {
            let session: SessionId = session.parse().context("reading the id of the session")?;
            let expiry_at = expiry.as_deref().map(|text| expiry_at(text, SystemTime::now())).transpose()?;
            let request = SharePost {
                kind: Some("adb".into()),
                description: Some(description),
                expiry_at,
                expiry_min: None,
            };
            let made = gateway(&stack)?.create_share(&session, &request).await.context("making the share")?;
            println!("{}", made.url.expose());
        }
        ShareCommand::List { stack, session_id } => {
            let session: Option<SessionId> =
                session_id.map(|id| id.parse()).transpose().context("reading the id of the session")?;
            let shares = gateway(&stack)?.shares(session.as_ref()).await.context("listing the shares")?;
            println!("{:<42} {:<21} {:<21} DESCRIPTION", "ID", "SESSION", "EXPIRES");
            for share in shares {
                let expires = UNIX_EPOCH + Duration::from_secs(share.expiry_at.max(0) as u64);
                println!(
                    "{:<42} {:<21} {:<21} {}",
                    share.id,
                    share.session_id,
                    humantime::format_rfc3339_seconds(expires).to_string(),
                    share.description
                );
            }
        }
        ShareCommand::Update { stack, id, description, expiry } => {
            let id = share_id(&id)?;
            if description.is_none() && expiry.is_none() {
                bail!("nothing to change: give --description or --expiry");
            }
            let expiry_at = expiry.as_deref().map(|text| expiry_at(text, SystemTime::now())).transpose()?;
            let request = SharePatch { description, expiry_at };
            gateway(&stack)?.update_share(&id, &request).await.context("changing the share")?;
        }
        ShareCommand::Delete { stack, id } => {
            gateway(&stack)?.delete_share(&share_id(&id)?).await.context("deleting the share")?;
        }
    }
    Ok(())
}

fn share_id(text: &str) -> Result<ShareId> {
    text.parse().context("reading the id of the share")
}

/// `fanlight config …`
///
/// # Errors
/// As the gateway says.
pub async fn config(command: ConfigCommand) -> Result<()> {
    match command {
        ConfigCommand::Show { stack } => {
            let items = gateway(&stack)?.config().await.context("reading the configuration")?;
            for (name, value) in items.config {
                println!("{name} = {value}");
            }
        }
        ConfigCommand::Set { stack, name, value } => {
            gateway(&stack)?.set_config(&name, &value).await.context("changing the configuration")?;
        }
    }
    Ok(())
}

/// The Unix time that a text means.
fn expiry_at(text: &str, now: SystemTime) -> Result<i64> {
    let time = if let Ok(after) = humantime::parse_duration(text) {
        now + after
    } else {
        let whole = if text.len() == 10 { format!("{text} 00:00:00") } else { text.to_owned() };
        humantime::parse_rfc3339_weak(&whole).with_context(|| {
            format!(
                "--expiry is {text:?}: a time from now like 24h, YYYY-MM-DD or YYYY-MM-DD HH:MM:SS is needed"
            )
        })?
    };
    Ok(time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expiries_are_times_from_now_or_dates() {
        let now = UNIX_EPOCH + Duration::from_secs(1000);
        for (text, expected) in [
            ("24h", 1000 + 86_400),
            ("30m", 1000 + 1800),
            ("2027-01-02", 1_798_848_000),
            ("2027-01-02 03:04:05", 1_798_859_045),
        ] {
            assert_eq!(expiry_at(text, now).expect(text), expected, "{text}");
        }
        for bad in ["", "soon", "2027-13-01", "01.02.2027"] {
            let error = expiry_at(bad, now).expect_err(bad).to_string();
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
    }
}
