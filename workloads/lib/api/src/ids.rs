//! Identifiers, one type per kind of thing so that they cannot be mixed up.
//!
//! Generated ids are xids: 20 characters of lower-case base32hex, sorted by time of creation
//! (gateway-api section 4, ams-model section 1). Foreign ids are accepted as long as they keep to the
//! character set that the public path expression allows, `[a-zA-Z0-9-_:.]`, and 1 to 255 characters.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{ObjectBuilder, RefOr, Schema, Type},
};

/// An id that is empty, too long or holds a character outside the allowed set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("id {id:?} is invalid: 1 to 255 characters of A-Z a-z 0-9 - _ : . are allowed")]
pub struct InvalidId {
    /// What was given, cut to 64 characters.
    pub id: String,
}

fn check(text: &str) -> Result<(), InvalidId> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b':' | b'.');
    let dots_only = text.bytes().all(|byte| byte == b'.');
    if text.is_empty() || text.len() > 255 || dots_only || !text.bytes().all(allowed) {
        return Err(InvalidId { id: text.chars().take(64).collect() });
    }
    Ok(())
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// A new xid, unique across machines and sorted by time.
            pub fn generate() -> Self {
                Self(xid::new().to_string())
            }

            /// The id as it appears in paths and bodies.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                let text = ObjectBuilder::new()
                    .schema_type(Type::String)
                    .min_length(Some(1))
                    .max_length(Some(255))
                    .pattern(Some("^[A-Za-z0-9_:.-]+$"));
                RefOr::T(Schema::Object(text.build()))
            }
        }

        impl ToSchema for $name {}

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                check(text)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                check(&text)?;
                Ok(Self(text))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

id!(
    /// One client's right to watch and drive one instance; owned by the gateway.
    SessionId
);
id!(
    /// One running application with its resources; owned by AMS.
    InstanceId
);
id!(
    /// A way into a session that its owner gave away; owned by the gateway.
    ShareId
);
id!(
    /// Something that can be run.
    ApplicationId
);
id!(
    /// A root file system to run from.
    ImageId
);
id!(
    /// A machine that hosts instances.
    NodeId
);
id!(
    /// The agent of a cluster; configured, stable over restarts.
    AgentId
);
id!(
    /// Long work shown as a resource.
    OperationId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_ids_have_twenty_characters_and_are_accepted_back() {
        let id = SessionId::generate();
        assert_eq!(id.as_str().len(), 20);
        assert_eq!(id.as_str().parse::<SessionId>(), Ok(id.clone()));
        assert_ne!(id, SessionId::generate());
    }

    #[test]
    fn ids_that_could_leave_their_path_segment_are_refused() {
        for bad in ["", ".", "..", "a/b", "a b", "ä", "a\0b", "a%2Fb", &"x".repeat(256)] {
            assert!(bad.parse::<InstanceId>().is_err(), "{bad:?}");
            assert!(serde_json::from_value::<InstanceId>(bad.into()).is_err(), "{bad:?}");
        }
    }
}
