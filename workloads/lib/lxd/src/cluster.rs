//! The cluster: members, joining, emptying and removing.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use fanlight_client::Endpoint;
use http::Method;
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::{
    Lxd, LxdError, Operation,
    call::{Call, part},
    server::nullable,
};

/// Joining copies the database, which may be large.
const JOIN_CALL: Duration = Duration::from_secs(60);

/// A member of a cluster.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ClusterMember {
    /// Unique name.
    pub server_name: String,
    /// Where it answers.
    pub url: String,
    /// Has a copy of the database.
    pub database: bool,
    /// `Online`, `Offline`, `Evacuated`, `Blocked`.
    pub status: String,
    /// More about the status, for people.
    pub message: String,
    /// `database-leader`, `database`, `database-standby`, and others.
    #[serde(deserialize_with = "nullable")]
    pub roles: Vec<String>,
    /// `x86_64`, `aarch64`.
    pub architecture: String,
    /// Groups it belongs to.
    #[serde(deserialize_with = "nullable")]
    pub groups: Vec<String>,
}

/// What a server needs to become a member.
#[derive(Clone, Debug)]
pub struct Join {
    /// Its name from then on.
    pub name: String,
    /// Where it will answer to the others, `HOST:PORT`.
    pub address: String,
    /// Where a member answers, `HOST:PORT`.
    pub cluster_address: String,
    /// Certificate of the cluster, PEM.
    pub cluster_certificate: String,
    /// Trust password of the cluster, or the secret of a token.
    pub secret: String,
    /// Settings of pools and networks that differ between members: entity, name, key, value.
    pub member_config: Vec<(String, String, String, String)>,
}

/// What lets one server into a cluster.
#[derive(Clone, Deserialize)]
pub struct JoinToken {
    /// The name that the member gets.
    #[serde(alias = "serverName")]
    pub server_name: String,
    /// SHA-256 of the cluster's certificate, hex.
    pub fingerprint: String,
    /// Where members answer.
    pub addresses: Vec<String>,
    /// Goes into [`Join::secret`].
    pub secret: String,
}

impl std::fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinToken").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

impl JoinToken {
    /// A token as an operator gets it from LXD: base64 of JSON.
    ///
    /// # Errors
    /// It is not one.
    pub fn parse(text: &str) -> Result<Self, LxdError> {
        let invalid = |reason: String| LxdError::Invalid { what: "token to join a cluster", reason };
        let json = STANDARD.decode(text.trim()).map_err(|error| invalid(error.to_string()))?;
        serde_json::from_slice(&json).map_err(|error| invalid(error.to_string()))
    }

    /// The cluster's certificate as PEM, from the first member that answers and shows the one that the token names.
    /// Returns the address of that member too.
    ///
    /// # Errors
    /// No member does.
    pub async fn certificate(&self) -> Result<(String, String), LxdError> {
        let reason = "it names no address".into();
        let mut problem = LxdError::Invalid { what: "token to join a cluster", reason };
        for address in &self.addresses {
            match Endpoint::certificate_of(&format!("https://{address}")).await {
                Ok(der) if hex::encode(Sha256::digest(&der)) == self.fingerprint.to_lowercase() => {
                    return Ok((address.clone(), pem(&der)));
                }
                Ok(_) => {
                    let reason = format!("{address} shows another certificate than the token names");
                    problem = LxdError::Invalid { what: "token to join a cluster", reason };
                }
                Err(error) => problem = error.into(),
            }
        }
        Err(problem)
    }
}

/// A certificate as text.
fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem + "-----END CERTIFICATE-----\n"
}

impl Lxd {
    /// All members.
    ///
    /// # Errors
    /// The call fails; a server alone refuses it.
    pub async fn members(&self) -> Result<Vec<ClusterMember>, LxdError> {
        self.tagged(Call::new(Method::GET, "/1.0/cluster/members").query("recursion", 1))
            .await
            .map(|(members, _)| members)
    }

    /// One member.
    ///
    /// # Errors
    /// There is none with this name, or the call fails.
    pub async fn member(&self, name: &str) -> Result<ClusterMember, LxdError> {
        self.get(&format!("/1.0/cluster/members/{}", part(name))).await
    }

    /// Makes a cluster of this server alone.
    ///
    /// # Errors
    /// The call fails, or it is in a cluster already.
    pub async fn enable_cluster(&self, name: &str) -> Result<Operation, LxdError> {
        let body = json!({ "server_name": name, "enabled": true });
        self.begin(Call::new(Method::PUT, "/1.0/cluster").json(&body).timeout(JOIN_CALL)).await
    }

    /// Makes this server a member of a cluster.
    ///
    /// # Errors
    /// The call fails.
    pub async fn join_cluster(&self, join: &Join) -> Result<Operation, LxdError> {
        let config: Vec<_> = join
            .member_config
            .iter()
            .map(|(entity, name, key, value)| {
                json!({ "entity": entity, "name": name, "key": key, "value": value })
            })
            .collect();
        let body = json!({
            "server_name": join.name,
            "enabled": true,
            "server_address": join.address,
            "cluster_address": join.cluster_address,
            "cluster_certificate": join.cluster_certificate,
            "cluster_password": join.secret,
            "member_config": config,
        });
        self.begin(Call::new(Method::PUT, "/1.0/cluster").json(&body).timeout(JOIN_CALL)).await
    }

    /// A token with which a server can become a member with this name.
    ///
    /// # Errors
    /// The call fails.
    pub async fn join_token(&self, name: &str) -> Result<JoinToken, LxdError> {
        let body = json!({ "server_name": name });
        let operation = self.begin(Call::new(Method::POST, "/1.0/cluster/members").json(&body)).await?;
        let mut metadata = operation.metadata["metadata"].clone();
        if metadata["serverName"].is_null() {
            metadata["serverName"] = name.into();
        }
        serde_json::from_value(metadata)
            .map_err(|error| LxdError::Answer { call: operation.call, reason: error.to_string() })
    }

    /// Moves or stops the instances of a member, which takes none from then on.
    ///
    /// # Errors
    /// The call fails.
    pub async fn evacuate(&self, member: &str) -> Result<Operation, LxdError> {
        self.change_member(member, "evacuate").await
    }

    /// Brings an emptied member and its instances back.
    ///
    /// # Errors
    /// The call fails.
    pub async fn restore(&self, member: &str) -> Result<Operation, LxdError> {
        self.change_member(member, "restore").await
    }

    async fn change_member(&self, member: &str, action: &str) -> Result<Operation, LxdError> {
        let path = format!("/1.0/cluster/members/{}/state", part(member));
        self.begin(Call::new(Method::POST, &path).json(&json!({ "action": action }))).await
    }

    /// Removes a member; with `force` also one that is lost, with all that it had.
    ///
    /// # Errors
    /// The call fails.
    pub async fn remove_member(&self, name: &str, force: bool) -> Result<(), LxdError> {
        let path = format!("/1.0/cluster/members/{}", part(name));
        let call = Call::new(Method::DELETE, &path).query("force", u8::from(force)).timeout(JOIN_CALL);
        self.done(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_and_tokens_are_read() {
        let text = r#"[{"roles":["database-leader"],"failure_domain":"default","description":"","config":{},
            "groups":["default"],"server_name":"m1","url":"https://10.1.1.11:8443","database":true,
            "status":"Online","message":"Fully operational","architecture":"x86_64"}]"#;
        let members: Vec<ClusterMember> = serde_json::from_str(text).expect("as LXD writes it");
        assert_eq!((members[0].server_name.as_str(), members[0].status.as_str()), ("m1", "Online"));
        let token = STANDARD.encode(
            r#"{"server_name":"m2","fingerprint":"ab","addresses":["10.1.1.11:8443"],"secret":"s3"}"#,
        );
        let token = JoinToken::parse(&token).expect("a token");
        assert_eq!(token.addresses, ["10.1.1.11:8443"]);
        assert!(!format!("{token:?}").contains("s3"));
        assert!(JoinToken::parse("not base64!").is_err());
    }
}
