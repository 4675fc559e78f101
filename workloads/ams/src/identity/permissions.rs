//! Who may do what (ams-api section 8.2), as plain values: which entitlements there are, what a set of permissions
//! allows, and what may be handed on. No store, no requests.

use std::{collections::BTreeSet, fmt, str::FromStr, sync::Arc};

use fanlight_api::ams::auth::{Entitlement, Permission};

/// The group whose members may do everything.
pub const ADMIN_GROUP: &str = "admin";
/// What a permission for the server as a whole names.
pub const SERVER: &str = "server";
/// The entitlement that includes all others.
pub const ADMIN: &str = "admin";

/// Kinds of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Somebody who may call.
    Identity,
    /// Identities with the same rights.
    Group,
    /// Part of several applications.
    Addon,
    /// Something that can be run.
    Application,
    /// What instances are made of.
    Image,
    /// A running application.
    Instance,
    /// A machine.
    Node,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 7] = [
        Self::Identity,
        Self::Group,
        Self::Addon,
        Self::Application,
        Self::Image,
        Self::Instance,
        Self::Node,
    ];

    /// As in permissions.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Group => "group",
            Self::Addon => "addon",
            Self::Application => "application",
            Self::Image => "image",
            Self::Instance => "instance",
            Self::Node => "node",
        }
    }

    /// Where its objects are in the API.
    fn collection(self) -> &'static str {
        match self {
            Self::Identity => "/1.0/auth/identities/",
            Self::Group => "/1.0/auth/groups/",
            Self::Addon => "/1.0/addons/",
            Self::Application => "/1.0/applications/",
            Self::Image => "/1.0/images/",
            Self::Instance => "/1.0/instances/",
            Self::Node => "/1.0/nodes/",
        }
    }

    /// Entitlements of its objects, with what they are for.
    pub fn entitlements(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Application => &[
                ("can_view", "Show it."),
                ("can_edit", "Change it."),
                ("can_delete", "Delete it."),
                ("can_publish", "Publish and revoke its versions."),
            ],
            Self::Instance => &[
                ("can_view", "Show it."),
                ("can_edit", "Start, stop and change it, and share it."),
                ("can_delete", "Delete it."),
                ("can_view_logs", "Read its logs."),
                ("can_exec", "Run programs inside it."),
            ],
            _ => &[("can_view", "Show it."), ("can_edit", "Change it."), ("can_delete", "Delete it.")],
        }
    }
}

/// Entitlements for the server as a whole, with what they are for.
pub const SERVER_ENTITLEMENTS: &[(&str, &str)] = &[
    (ADMIN, "Everything."),
    ("can_view_config", "Show the settings."),
    ("can_edit_config", "Change the settings."),
    ("can_view_tasks", "Show the tasks."),
    ("can_view_metrics", "Read the metrics."),
    ("can_view_registry_applications", "Show the applications of a registry; there is none."),
    ("can_delete_registry_applications", "Delete applications of a registry; there is none."),
    ("can_push_registry_applications", "Push applications to a registry; there is none."),
    ("can_pull_registry_applications", "Pull applications from a registry; there is none."),
    ("can_create_addons", "Add addons."),
    ("can_create_groups", "Add groups."),
    ("can_create_applications", "Add applications."),
    ("can_create_instances", "Launch instances."),
    ("can_create_nodes", "Add nodes."),
    ("can_create_images", "Add images."),
    ("can_register_identities", "Add identities."),
    ("can_view_operations", "Nothing any more: an operation is shown to whoever may see its objects."),
];

/// What a permission is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// The server as a whole.
    Server,
    /// All objects of a kind.
    All(Kind),
    /// One object, by id; groups, nodes and addons by name.
    One(Kind, String),
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server => f.write_str(SERVER),
            Self::All(kind) => write!(f, "{}:*", kind.as_str()),
            Self::One(kind, id) => write!(f, "{}:{id}", kind.as_str()),
        }
    }
}

impl FromStr for Object {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == SERVER {
            return Ok(Self::Server);
        }
        let parts = text.split_once(':');
        let kind = parts.and_then(|(kind, _)| Kind::ALL.into_iter().find(|known| known.as_str() == kind));
        let (Some((_, id)), Some(kind)) = (parts, kind) else {
            let kinds = Kind::ALL.map(Kind::as_str).join(", ");
            return Err(format!("it is neither {SERVER} nor KIND:ID with one of the kinds {kinds}"));
        };
        if id == "*" {
            return Ok(Self::All(kind));
        }
        if !is_name(id, 255) {
            return Err("after the colon comes the id of an object, or * for all".into());
        }
        Ok(Self::One(kind, id.to_owned()))
    }
}

/// What must be held to see what an address of the API stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needed {
    /// E.g. `can_view`.
    pub entitlement: &'static str,
    /// Of what.
    pub object: Object,
}

/// What must be held to see the object at an address, as operations and events name it. What is not known is for
/// administrators.
pub fn to_see(url: &str) -> Needed {
    // Older clients know instances as containers.
    let url = match url.strip_prefix("/1.0/containers/") {
        Some(rest) => format!("/1.0/instances/{rest}"),
        None => url.to_owned(),
    };
    for kind in Kind::ALL {
        let id = url.strip_prefix(kind.collection()).and_then(|rest| rest.split('/').next());
        if let Some(id) = id.filter(|id| !id.is_empty()) {
            return Needed { entitlement: "can_view", object: Object::One(kind, id.to_owned()) };
        }
    }
    let entitlement = if url == "/1.0/config" { "can_view_config" } else { ADMIN };
    Needed { entitlement, object: Object::Server }
}

/// Whether a text can be the name of a group, or the id of an object.
pub fn is_name(text: &str, most: usize) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=most).contains(&text.len()) && text.bytes().all(allowed)
}

/// Checks a permission that somebody wants to give.
///
/// # Errors
/// What is wrong with it, with its value.
pub fn check(permission: &Permission) -> Result<(), String> {
    let shown = |text: &str| text.chars().take(80).collect::<String>();
    let object: Object = permission
        .resource
        .parse()
        .map_err(|reason| format!("resource {:?}: {reason}", shown(&permission.resource)))?;
    let known = match object {
        Object::Server => SERVER_ENTITLEMENTS,
        Object::All(kind) | Object::One(kind, _) => kind.entitlements(),
    };
    if known.iter().any(|(name, _)| *name == permission.entitlement) {
        return Ok(());
    }
    let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
    Err(format!(
        "entitlement {:?}: for {object} there are {}",
        shown(&permission.entitlement),
        names.join(", ")
    ))
}

/// Everything there is to be allowed, by kind, for `GET /1.0`.
pub fn catalogue() -> std::collections::BTreeMap<String, Vec<Entitlement>> {
    let list = |known: &[(&str, &str)]| {
        let one = |(name, description): &(&str, &str)| Entitlement {
            entitlement_name: (*name).into(),
            description: (*description).into(),
        };
        known.iter().map(one).collect()
    };
    let kinds = Kind::ALL.into_iter().map(|kind| (kind.as_str().to_owned(), list(kind.entitlements())));
    kinds.chain([(SERVER.to_owned(), list(SERVER_ENTITLEMENTS))]).collect()
}

/// What somebody may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Everything.
    Everything,
    /// This, and nothing else.
    Held(Arc<BTreeSet<Permission>>),
}

impl Rights {
    /// Nothing at all.
    pub fn nothing() -> Self {
        Self::Held(Arc::default())
    }

    /// The sum of some permissions.
    pub fn of(permissions: impl IntoIterator<Item = Permission>) -> Self {
        let held: BTreeSet<Permission> = permissions.into_iter().collect();
        if held.contains(&permission(ADMIN, &Object::Server)) {
            return Self::Everything;
        }
        Self::Held(Arc::new(held))
    }

    /// Whether this is allowed. All objects of a kind together need a permission for all of them.
    pub fn may(&self, entitlement: &str, object: &Object) -> bool {
        let Self::Held(held) = self else { return true };
        let wide = match object {
            Object::One(kind, _) => held.contains(&permission(entitlement, &Object::All(*kind))),
            Object::Server | Object::All(_) => false,
        };
        wide || held.contains(&permission(entitlement, object))
    }

    /// Whether what an address stands for may be seen.
    pub fn may_see(&self, url: &str) -> bool {
        let needed = to_see(url);
        self.may(needed.entitlement, &needed.object)
    }

    /// What is held for one object, for its member `entitlements`.
    pub fn entitlements(&self, object: &Object) -> Vec<&'static str> {
        let known = match object {
            Object::Server => SERVER_ENTITLEMENTS,
            Object::All(kind) | Object::One(kind, _) => kind.entitlements(),
        };
        known.iter().map(|(name, _)| *name).filter(|name| self.may(name, object)).collect()
    }

    /// Whether a permission may be handed on to others: nobody gives what they do not have.
    pub fn covers(&self, permission: &Permission) -> bool {
        permission.resource.parse().is_ok_and(|object| self.may(&permission.entitlement, &object))
    }

    /// As a list.
    pub fn permissions(&self) -> Vec<Permission> {
        match self {
            Self::Everything => vec![permission(ADMIN, &Object::Server)],
            Self::Held(held) => held.iter().cloned().collect(),
        }
    }
}

fn permission(entitlement: &str, object: &Object) -> Permission {
    Permission { entitlement: entitlement.to_owned(), resource: object.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights(list: &[(&str, &str)]) -> Rights {
        Rights::of(list.iter().map(|(entitlement, resource)| Permission {
            entitlement: (*entitlement).into(),
            resource: (*resource).into(),
        }))
    }

    #[test]
    fn a_permission_allows_what_it_names_and_nothing_beside_it() {
        let some = &[("can_view", "instance:a"), ("can_exec", "instance:*"), ("can_create_nodes", "server")];
        for (held, entitlement, object, allowed) in [
            (&some[..], "can_view", "instance:a", true),
            (some, "can_view", "instance:b", false),
            (some, "can_view", "application:a", false),
            (some, "can_edit", "instance:a", false),
            (some, "can_exec", "instance:a", true),
            (some, "can_exec", "instance:b", true),
            (some, "can_exec", "instance:*", true),
            (some, "can_view", "instance:*", false),
            (some, "can_create_nodes", "server", true),
            (some, "can_create_images", "server", false),
            (some, "admin", "server", false),
            (&[], "can_view", "node:n", false),
            (&[("admin", "server")], "can_view", "node:n", true),
            (&[("admin", "server")], "can_delete", "group:*", true),
            (&[("admin", "server")], "can_edit_config", "server", true),
            // Only the server's `admin` is everything.
            (&[("admin", "instance:a")], "can_view", "instance:a", false),
            (&[("can_view", "*")], "can_view", "instance:a", false),
        ] {
            let object: Object = object.parse().expect("valid");
            assert_eq!(rights(held).may(entitlement, &object), allowed, "{held:?} {entitlement} {object}");
        }
    }

    #[test]
    fn what_is_seen_of_operations_follows_the_objects_they_are_about() {
        let some =
            rights(&[("can_view", "instance:a"), ("can_view_config", "server"), ("can_view", "node:*")]);
        for (url, seen) in [
            ("/1.0/instances/a", true),
            ("/1.0/containers/a", true),
            ("/1.0/instances/a/shares/b", true),
            ("/1.0/instances/b", false),
            ("/1.0/instances/", false),
            ("/1.0/nodes/n", true),
            ("/1.0/config", true),
            ("/1.0/certificates/ab", false),
            ("/1.0/auth/identities/a", false),
            ("", false),
        ] {
            assert_eq!(some.may_see(url), seen, "{url}");
            assert!(Rights::Everything.may_see(url), "{url}");
            assert!(!Rights::nothing().may_see(url), "{url}");
        }
    }

    #[test]
    fn wrong_permissions_are_refused_by_name() {
        for (entitlement, resource, part) in [
            ("can_fly", "instance:a", "can_fly"),
            ("can_exec", "node:a", "for node:a there are can_view, can_edit, can_delete"),
            ("can_view", "server", "can_view_config"),
            ("can_view", "galaxy:a", "galaxy:a"),
            ("can_view", "instance", "KIND:ID"),
            ("can_view", "instance:", "after the colon"),
            ("can_view", "instance:a/b", "after the colon"),
            ("can_view", "instance:**", "after the colon"),
        ] {
            let wrong = Permission { entitlement: entitlement.into(), resource: resource.into() };
            let text = check(&wrong).expect_err(resource);
            assert!(text.contains(part), "{part}: {text}");
        }
        for (kind, list) in catalogue() {
            for entitlement in list {
                let resource = if kind == SERVER { kind.clone() } else { format!("{kind}:*") };
                check(&Permission { entitlement: entitlement.entitlement_name, resource }).expect("known");
            }
        }
    }

    #[test]
    fn nobody_hands_on_more_than_they_have() {
        let some = rights(&[("can_view", "instance:*"), ("can_edit", "node:n")]);
        for (entitlement, resource, covered) in [
            ("can_view", "instance:*", true),
            ("can_view", "instance:a", true),
            ("can_edit", "node:n", true),
            ("can_edit", "node:*", false),
            ("admin", "server", false),
            ("can_view", "nonsense", false),
        ] {
            let wanted = Permission { entitlement: entitlement.into(), resource: resource.into() };
            assert_eq!(some.covers(&wanted), covered, "{wanted:?}");
            assert!(resource == "nonsense" || Rights::Everything.covers(&wanted));
        }
        assert_eq!(some.entitlements(&Object::One(Kind::Node, "n".into())), ["can_edit"]);
        assert_eq!(Rights::Everything.permissions(), rights(&[("admin", "server")]).permissions());
    }
}
