//! The client commands: each asks a running stack over its unix sockets and prints the answer.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use fanlight_api::{
    SessionId,
    gateway::{AccountRights, AccountsPost},
};
use fanlight_client::{AmsClient, Endpoint, GatewayClient, SessionsQuery};

use crate::{
    cli::{AccountCommand, SessionCommand, Stack},
    state::{State, read_optional},
};

/// The gateway of a stack, with all rights.
///
/// # Errors
/// No stack has ever run from this folder.
pub fn gateway(stack: &Stack) -> Result<GatewayClient> {
    Ok(GatewayClient::new(socket(&existing(&stack.state)?.gateway_socket())?, None))
}

/// AMS of a stack, with all rights.
///
/// # Errors
/// No stack has ever run from this folder.
pub fn ams(stack: &Stack) -> Result<AmsClient> {
    Ok(AmsClient::new(socket(&existing(&stack.state)?.ams_socket())?))
}

fn existing(folder: &Path) -> Result<State> {
    if !folder.is_dir() {
        bail!(
            "{} is no state folder of a stack; start one with `fanlight up`, or name it with --state",
            folder.display()
        );
    }
    State::open(folder)
}

fn socket(path: &Path) -> Result<Endpoint> {
    Endpoint::unix(path).with_context(|| format!("preparing to speak on {}", path.display()))
}

/// Prints a fresh link to the page.
///
/// # Errors
/// The stack does not run.
pub async fn code(stack: &Stack) -> Result<()> {
    let state = existing(&stack.state)?;
    let code =
        gateway(stack)?.login_code().await.context("asking the gateway for a code; does the stack run?")?;
    let Some(base) = read_optional(&state.page_note())? else {
        bail!("the stack at {} has not said where its page is", state.folder().display());
    };
    println!("{}#code={}", base.trim(), code.code.expose());
    Ok(())
}

/// `fanlight account …`
///
/// # Errors
/// As the gateway says.
pub async fn account(command: AccountCommand) -> Result<()> {
    match command {
        AccountCommand::Create { stack, name, expires_in, launch_only } => {
            let expiry_at = expires_in.map(|after| unix_seconds(SystemTime::now() + after));
            let rights = if launch_only { AccountRights::Launch } else { AccountRights::Full };
            let request = AccountsPost { name, expiry_at, rights };
            let created = gateway(&stack)?.create_account(&request).await.context("creating the account")?;
            println!("{}", created.token.expose());
        }
        AccountCommand::List { stack } => {
            let accounts = gateway(&stack)?.accounts().await.context("listing the accounts")?;
            println!("{:<32} {:<8} EXPIRES", "NAME", "RIGHTS");
            for account in accounts {
                let rights = match account.rights {
                    AccountRights::Full => "full",
                    AccountRights::Launch => "launch",
                };
                let expires = account.expiry_at.map_or("never".to_owned(), |at| {
                    let at = UNIX_EPOCH + Duration::from_secs(at.max(0) as u64);
                    humantime::format_rfc3339_seconds(at).to_string()
                });
                println!("{:<32} {rights:<8} {expires}", account.name);
            }
        }
        AccountCommand::Delete { stack, name } => {
            gateway(&stack)?.delete_account(&name).await.context("deleting the account")?;
        }
    }
    Ok(())
}

/// `fanlight session …`
///
/// # Errors
/// As the gateway says.
pub async fn session(command: SessionCommand) -> Result<()> {
    match command {
        SessionCommand::List { stack } => {
            let sessions =
                gateway(&stack)?.sessions(&SessionsQuery::default()).await.context("listing the sessions")?;
            println!("{:<21} {:<16} {:<12} MESSAGE", "ID", "APPLICATION", "STATUS");
            for session in sessions {
                let status = format!("{:?}", session.status).to_lowercase();
                println!("{:<21} {:<16} {status:<12} {}", session.id, session.app, session.status_message);
            }
        }
        SessionCommand::Delete { stack, id } => {
            let id: SessionId = id.parse().context("reading the id of the session")?;
            gateway(&stack)?.delete_session(&id, true).await.context("deleting the session")?;
        }
    }
    Ok(())
}

fn unix_seconds(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}
