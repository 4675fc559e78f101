//! Bodies about who may call and what they may do: identities, groups, permissions and OIDC (ams-api section 8),
//! and about the settings of AMS (section 13).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::nullable;
use crate::Secret;

/// How an identity shows that it is who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AuthenticationMethod {
    /// By a client certificate.
    Tls,
    /// By a token of the OIDC provider.
    Oidc,
}

impl AuthenticationMethod {
    /// As on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tls => "tls",
            Self::Oidc => "oidc",
        }
    }
}

/// Somebody who may call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Xid.
    pub id: String,
    /// For people.
    #[serde(default)]
    pub name: String,
    /// Names of the groups it is in.
    #[serde(default, deserialize_with = "nullable")]
    pub groups: Vec<String>,
    /// How it shows that it is who it is.
    pub authentication_method: AuthenticationMethod,
    /// Unix seconds.
    #[serde(default)]
    pub created_at: i64,
    /// Unix seconds.
    #[serde(default)]
    pub updated_at: i64,
    /// SHA-256 of the certificate; empty for OIDC.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub fingerprint: String,
    /// E-mail address that the provider vouches for; empty for TLS.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub email: String,
    /// Base64 of the certificate's DER form; empty for OIDC.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub certificate: String,
}

/// Body of `POST /1.0/auth/identities`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct IdentitiesPost {
    /// `tls` or `oidc`.
    #[serde(deserialize_with = "nullable")]
    pub authentication_method: String,
    /// For people.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Of an OIDC identity.
    #[serde(deserialize_with = "nullable")]
    pub email: String,
    /// Of a TLS identity: base64 of the DER form; PEM is accepted too.
    #[serde(deserialize_with = "nullable")]
    pub certificate: String,
}

/// Body of `PUT /1.0/auth/identities/{id}`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct IdentityPut {
    /// Replaces all groups.
    #[serde(deserialize_with = "nullable")]
    pub groups: Vec<String>,
}

/// A right to do something.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub struct Permission {
    /// What, e.g. `can_view`.
    pub entitlement: String,
    /// With what: `server`, `instance:ID`, or `instance:*` for all of a kind.
    pub resource: String,
}

/// Identities with the same rights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Unique.
    pub name: String,
    /// For people.
    #[serde(default)]
    pub description: String,
    /// Unix seconds.
    #[serde(default)]
    pub created_at: i64,
    /// Unix seconds.
    #[serde(default)]
    pub updated_at: i64,
    /// Ids of its members.
    #[serde(default, deserialize_with = "nullable")]
    pub identities: Vec<String>,
    /// What its members may do.
    #[serde(default, deserialize_with = "nullable")]
    pub permissions: Vec<Permission>,
    /// Can be neither changed nor deleted.
    #[serde(default)]
    pub immutable: bool,
}

/// Body of `POST /1.0/auth/groups`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct GroupsPost {
    /// Unique.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// For people.
    #[serde(deserialize_with = "nullable")]
    pub description: String,
}

/// Body of `PUT /1.0/auth/groups/{name}`. What is absent stays.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct GroupPut {
    /// Replaces the description.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Replaces all permissions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub permissions: Option<Vec<Permission>>,
}

/// An entitlement that exists, in `auth_permissions` of `GET /1.0`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entitlement {
    /// E.g. `can_view`.
    pub entitlement_name: String,
    /// For people.
    pub description: String,
}

/// Answer of `GET /1.0/auth/oidc`: what a client needs to log in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OidcInfo {
    /// URL of the provider.
    pub issuer: String,
    /// What to ask the provider for.
    #[serde(deserialize_with = "nullable")]
    pub required_scopes: Vec<String>,
    /// Of the client; only for grants without a secret.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub client_id: String,
    /// Of the token; only for grants without a secret.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub audience: String,
}

/// Answer of `POST /1.0/events/auth`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EventsToken {
    /// For `GET /1.0/events?token=`, for a minute.
    pub token: Secret,
}

/// Body of `PATCH /1.0/config`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ConfigPatch {
    /// Key.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Value; empty: the default again.
    #[serde(deserialize_with = "nullable")]
    pub value: Secret,
}
