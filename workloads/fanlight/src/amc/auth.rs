//! `fanlight auth …`: who is let in, and what they may do.

use anyhow::{Context as _, Result};
use fanlight_client::AmsClient;
use serde_json::{Value, json};

use super::{
    cli::{
        AuthCommand, DeleteAuth, GroupCommand, GroupPermission, IdentityCommand, List, PermissionCommand,
        Show,
    },
    failure::NotFound,
    output::{self, Column, cell},
    progress::{finish, follow},
    remotes::{certificate_text, client},
};

const IDENTITIES: &str = "/1.0/auth/identities";
const GROUPS: &str = "/1.0/auth/groups";
const PERMISSIONS: &str = "/1.0/auth/permissions";

const IDENTITY_COLUMNS: &[Column] = &[
    ("ID", |identity| cell(identity, "/id")),
    ("NAME", |identity| cell(identity, "/name")),
    ("METHOD", |identity| cell(identity, "/authentication_method")),
    ("GROUPS", |identity| cell(identity, "/groups")),
    ("EMAIL", |identity| cell(identity, "/email")),
    ("FINGERPRINT", |identity| cell(identity, "/fingerprint").chars().take(12).collect()),
];
const GROUP_COLUMNS: &[Column] = &[
    ("NAME", |group| cell(group, "/name")),
    ("DESCRIPTION", |group| cell(group, "/description")),
    ("IDENTITIES", |group| group["identities"].as_array().map_or(0, Vec::len).to_string()),
    ("PERMISSIONS", |group| group["permissions"].as_array().map_or(0, Vec::len).to_string()),
];
const PERMISSION_COLUMNS: &[Column] = &[
    ("ENTITLEMENT", |permission| cell(permission, "/entitlement")),
    ("RESOURCE", |permission| cell(permission, "/resource")),
];

/// `fanlight auth …`
///
/// # Errors
/// As AMS says.
pub async fn auth(command: AuthCommand) -> Result<()> {
    match command {
        AuthCommand::Identity { command } => identity(command).await,
        AuthCommand::Group { command } => group(command).await,
        AuthCommand::Permission { command: PermissionCommand::Ls(options) } => {
            list(&options, PERMISSIONS, PERMISSION_COLUMNS).await
        }
    }
}

async fn list(options: &List, collection: &str, columns: &[Column]) -> Result<()> {
    let ams = client(&options.target)?;
    let found = ams.objects(collection, &[]).await.with_context(|| format!("listing {collection}"))?;
    output::list(options.output.format, &found, columns)
}

async fn show(options: &Show, collection: &str) -> Result<()> {
    let ams = client(&options.target)?;
    let found =
        ams.object(collection, &options.name).await.with_context(|| format!("showing {}", options.name))?;
    output::object(options.output.format, &found)
}

async fn delete(options: DeleteAuth, collection: &str, what: &str) -> Result<()> {
    let ams = client(&options.target)?;
    let doing = format!("deleting {what} {}", options.name);
    let operation =
        ams.remove(collection, &options.name, options.force).await.with_context(|| doing.clone())?;
    follow(&ams, &operation, &doing, &options.patience).await
}

async fn identity(command: IdentityCommand) -> Result<()> {
    match command {
        IdentityCommand::Ls(options) => list(&options, IDENTITIES, IDENTITY_COLUMNS).await,
        IdentityCommand::Show(options) => show(&options, IDENTITIES).await,
        IdentityCommand::Create { target, name, certificate, email, groups, patience } => {
            let body = match &certificate {
                Some(file) => {
                    json!({ "authentication_method": "tls", "name": name, "certificate": certificate_text(file)? })
                }
                None => json!({ "authentication_method": "oidc", "name": name, "email": email }),
            };
            let ams = client(&target)?;
            let doing = format!("letting {name} in");
            let operation = ams.create(IDENTITIES, &body).await.with_context(|| doing.clone())?;
            let id = operation.resource("identities").map(str::to_owned);
            if groups.is_empty() {
                follow(&ams, &operation, &doing, &patience).await?;
            } else {
                // It must be there before it can be put anywhere.
                finish(&ams, &operation, &doing, patience.timeout).await?;
                let id = id.as_deref().context("the server names no identity, so it is in no group")?;
                set_groups(&ams, id, &groups, &patience).await?;
            }
            if let Some(id) = id {
                output::print(&format!("{id}\n"))?;
            }
            Ok(())
        }
        IdentityCommand::Groups { target, id, groups, patience } => {
            set_groups(&client(&target)?, &id, &groups, &patience).await
        }
        IdentityCommand::Delete(options) => delete(options, IDENTITIES, "identity").await,
    }
}

async fn set_groups(
    ams: &AmsClient,
    id: &str,
    groups: &[String],
    patience: &super::cli::Patience,
) -> Result<()> {
    let doing = format!("putting {id} into its groups");
    let operation =
        ams.put(IDENTITIES, id, &json!({ "groups": groups })).await.with_context(|| doing.clone())?;
    follow(ams, &operation, &doing, patience).await
}

async fn group(command: GroupCommand) -> Result<()> {
    match command {
        GroupCommand::Ls(options) => list(&options, GROUPS, GROUP_COLUMNS).await,
        GroupCommand::Show(options) => show(&options, GROUPS).await,
        GroupCommand::Create { target, name, description, patience } => {
            let ams = client(&target)?;
            let doing = format!("making group {name}");
            let body = json!({ "name": name, "description": description });
            let operation = ams.create(GROUPS, &body).await.with_context(|| doing.clone())?;
            follow(&ams, &operation, &doing, &patience).await
        }
        GroupCommand::Describe { target, name, description, patience } => {
            let ams = client(&target)?;
            let doing = format!("changing group {name}");
            let body = json!({ "description": description });
            let operation = ams.put(GROUPS, &name, &body).await.with_context(|| doing.clone())?;
            follow(&ams, &operation, &doing, &patience).await
        }
        GroupCommand::Grant(options) => permit(options, true).await,
        GroupCommand::Revoke(options) => permit(options, false).await,
        GroupCommand::Delete(options) => delete(options, GROUPS, "group").await,
    }
}

/// The API replaces all permissions of a group, so they are read before.
async fn permit(options: GroupPermission, granted: bool) -> Result<()> {
    let ams = client(&options.target)?;
    let doing = format!("changing the permissions of group {}", options.group);
    let group = ams.object(GROUPS, &options.group).await.with_context(|| doing.clone())?;
    let present = group["permissions"].as_array().cloned().unwrap_or_default();
    let Some(wanted) = permissions(present, &options.entitlement, &options.resource, granted) else {
        if granted {
            return Ok(());
        }
        let text = format!(
            "group {} has no permission {} on {}",
            options.group, options.entitlement, options.resource
        );
        return Err(NotFound(text).into());
    };
    let body = json!({ "permissions": wanted });
    let operation = ams.put(GROUPS, &options.group, &body).await.with_context(|| doing.clone())?;
    follow(&ams, &operation, &doing, &options.patience).await
}

/// The permissions with one more or one less; none where nothing changes.
fn permissions(
    mut present: Vec<Value>,
    entitlement: &str,
    resource: &str,
    granted: bool,
) -> Option<Vec<Value>> {
    let before = present.len();
    present
        .retain(|permission| permission["entitlement"] != entitlement || permission["resource"] != resource);
    let had = present.len() < before;
    if had == granted {
        return None;
    }
    if granted {
        present.push(json!({ "entitlement": entitlement, "resource": resource }));
    }
    Some(present)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_added_and_taken_one_by_one() {
        let one = json!({"entitlement": "can_view", "resource": "instance:*"});
        let two = json!({"entitlement": "can_view", "resource": "server"});
        let both = permissions(vec![one.clone()], "can_view", "server", true).expect("one more");
        assert_eq!(both, [one.clone(), two.clone()]);
        assert_eq!(permissions(both.clone(), "can_view", "server", true), None, "it is there");
        assert_eq!(permissions(both, "can_view", "instance:*", false), Some(vec![two]));
        assert_eq!(permissions(vec![one], "can_edit", "instance:*", false), None, "it is not there");
    }
}
