//! The server itself: what it can do, what it has, whom it trusts, its projects, profiles and storage pools.

use std::collections::BTreeMap;

use http::Method;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use crate::{
    Lxd, LxdError,
    call::{Call, part},
};

/// How often a change is tried again when others change the same thing at the same time.
const ENSURE_TRIES: usize = 5;

/// `null` is an empty list to LXD.
pub(crate) fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// The server.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Server {
    /// What it can do, by name.
    #[serde(deserialize_with = "nullable")]
    pub api_extensions: Vec<String>,
    /// `trusted` or `untrusted`: what we are to it.
    pub auth: String,
    /// About it; empty for those it does not trust.
    pub environment: Environment,
}

/// About a server.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Environment {
    /// `lxd`.
    pub server: String,
    /// Release.
    pub server_version: String,
    /// Name of the machine or member.
    pub server_name: String,
    /// Part of a cluster.
    pub server_clustered: bool,
    /// Its certificate, PEM.
    pub certificate: String,
    /// SHA-256 of it, hex.
    pub certificate_fingerprint: String,
    /// Where it listens.
    #[serde(deserialize_with = "nullable")]
    pub addresses: Vec<String>,
    /// What it runs, best first.
    #[serde(deserialize_with = "nullable")]
    pub architectures: Vec<String>,
}

/// What a machine has.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// Processors.
    pub cpu: Cpu,
    /// Memory.
    pub memory: Memory,
    /// GPUs.
    pub gpu: Gpu,
}

/// Processors.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Cpu {
    /// `x86_64`, `aarch64`.
    pub architecture: String,
    /// Threads.
    pub total: u32,
}

/// Bytes of memory.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// Taken.
    pub used: u64,
    /// There are.
    pub total: u64,
}

/// GPUs.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Gpu {
    /// All of them.
    #[serde(deserialize_with = "nullable")]
    pub cards: Vec<Card>,
}

/// One GPU.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Card {
    /// Driver of the kernel.
    pub driver: String,
    /// On the bus.
    pub pci_address: String,
    /// Hexadecimal.
    pub vendor_id: String,
    /// For people.
    pub vendor: String,
    /// For people.
    pub product: String,
    /// Where it is in the machine.
    pub numa_node: u32,
    /// Its device nodes.
    pub drm: Option<Drm>,
}

/// Device nodes of a GPU.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Drm {
    /// `card0`.
    pub card_name: String,
    /// `renderD128`.
    pub render_name: String,
}

/// Bytes of a storage pool.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Space {
    /// Taken.
    pub used: u64,
    /// There are.
    pub total: u64,
}

impl Server {
    /// Whether it can do this.
    pub fn has(&self, extension: &str) -> bool {
        self.api_extensions.iter().any(|known| known == extension)
    }
}

impl Lxd {
    /// The server.
    ///
    /// # Errors
    /// The call fails.
    pub async fn server(&self) -> Result<Server, LxdError> {
        self.get("/1.0").await
    }

    /// What the machine, or the member that is the target, has.
    ///
    /// # Errors
    /// The call fails.
    pub async fn resources(&self) -> Result<Resources, LxdError> {
        self.get("/1.0/resources").await
    }

    /// Changes keys of the server's configuration; those that are not named stay.
    ///
    /// # Errors
    /// The call fails.
    pub async fn configure(&self, config: &BTreeMap<String, Value>) -> Result<(), LxdError> {
        self.done(Call::new(Method::PATCH, "/1.0").json(&json!({ "config": config }))).await
    }

    /// The space of a storage pool, on the member that is the target.
    ///
    /// # Errors
    /// The call fails.
    pub async fn pool_space(&self, pool: &str) -> Result<Space, LxdError> {
        #[derive(Deserialize)]
        struct Answer {
            space: Space,
        }
        let path = format!("/1.0/storage-pools/{}/resources", part(pool));
        Ok(self.get::<Answer>(&path).await?.space)
    }

    /// Makes the server trust the certificate that we show, by the trust password or a token of an operator.
    ///
    /// # Errors
    /// The secret is wrong, or the certificate is trusted already ([`LxdError::is_exists`]).
    pub async fn trust_us(&self, name: &str, secret: &str) -> Result<(), LxdError> {
        let body = json!({ "type": "client", "name": name, "password": secret });
        self.done(Call::new(Method::POST, "/1.0/certificates").json(&body)).await
    }

    /// Makes the server trust this certificate: base64 of its DER form. For those who are trusted.
    ///
    /// # Errors
    /// The call fails, or the certificate is trusted already ([`LxdError::is_exists`]).
    pub async fn trust(&self, name: &str, certificate: &str) -> Result<(), LxdError> {
        let body = json!({ "type": "client", "name": name, "certificate": certificate });
        self.done(Call::new(Method::POST, "/1.0/certificates").json(&body)).await
    }

    /// Ends the trust in a certificate.
    ///
    /// # Errors
    /// The call fails.
    pub async fn distrust(&self, fingerprint: &str) -> Result<(), LxdError> {
        let path = format!("/1.0/certificates/{}", part(fingerprint));
        self.done(Call::new(Method::DELETE, &path)).await
    }

    /// Makes a project, or gives the one there is these keys.
    ///
    /// # Errors
    /// The call fails.
    pub async fn ensure_project(
        &self,
        name: &str,
        config: &BTreeMap<String, String>,
    ) -> Result<(), LxdError> {
        self.ensure("/1.0/projects", name, json!({ "config": config })).await
    }

    /// Makes a profile in the project, or gives the one there is these keys and devices.
    ///
    /// # Errors
    /// The call fails.
    pub async fn ensure_profile(
        &self,
        name: &str,
        config: &BTreeMap<String, String>,
        devices: &BTreeMap<String, BTreeMap<String, String>>,
    ) -> Result<(), LxdError> {
        self.ensure("/1.0/profiles", name, json!({ "config": config, "devices": devices })).await
    }

    /// Reads, merges and writes: LXD 5.0 takes the keys of a project that a PATCH does not name for removed.
    async fn ensure(&self, folder: &str, name: &str, body: Value) -> Result<(), LxdError> {
        let path = format!("{folder}/{}", part(name));
        for attempt in 1.. {
            let (mut there, tag) = match self.tagged::<Value>(Call::new(Method::GET, &path)).await {
                Ok(there) => there,
                Err(error) if error.is_not_found() => {
                    let mut new = body.clone();
                    new["name"] = name.into();
                    match self.done(Call::new(Method::POST, folder).json(&new)).await {
                        // Somebody else was quicker; theirs gets our keys.
                        Err(error) if error.is_exists() && attempt < ENSURE_TRIES => continue,
                        result => return result,
                    }
                }
                Err(error) => return Err(error),
            };
            let before = there.clone();
            for (section, values) in body.as_object().into_iter().flatten() {
                for (key, value) in values.as_object().into_iter().flatten() {
                    there[section][key] = value.clone();
                }
            }
            if there == before {
                return Ok(());
            }
            let call = Call::new(Method::PUT, &path).header("if-match", &tag)?.json(&there);
            match self.done(call).await {
                Err(error) if error.is_precondition() && attempt < ENSURE_TRIES => {}
                result => return result,
            }
        }
        unreachable!("the loop ends by returning")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_without_gpus_and_with_one_are_read() {
        let text = r#"{"cpu":{"architecture":"x86_64","sockets":[],"total":2},
            "memory":{"nodes":null,"hugepages_total":0,"used":1000,"total":25000},
            "gpu":{"cards":null,"total":0},"network":{"cards":null,"total":0}}"#;
        let none: Resources = serde_json::from_str(text).expect("as LXD writes it");
        assert_eq!((none.cpu.total, none.memory.total, none.gpu.cards.len()), (2, 25000, 0));
        let text = r#"{"gpu":{"cards":[{"driver":"amdgpu","driver_version":"6.8","drm":{"id":0,
            "card_name":"card0","card_device":"226:0","render_name":"renderD128","render_device":"226:128"},
            "numa_node":1,"pci_address":"0000:09:00.0","vendor":"AMD","vendor_id":"1002",
            "product":"Navi","product_id":"67ef"}],"total":1}}"#;
        let one: Resources = serde_json::from_str(text).expect("as LXD writes it");
        let card = &one.gpu.cards[0];
        assert_eq!((card.pci_address.as_str(), card.numa_node), ("0000:09:00.0", 1));
        assert_eq!(card.drm.as_ref().map(|drm| drm.render_name.as_str()), Some("renderD128"));
    }

    #[test]
    fn a_server_that_does_not_trust_us_is_read() {
        let text = r#"{"config":null,"api_extensions":["resources","clustering"],"api_status":"stable",
            "api_version":"1.0","auth":"untrusted","public":false,"auth_methods":["tls"]}"#;
        let server: Server = serde_json::from_str(text).expect("as LXD writes it");
        assert!(server.has("clustering") && !server.has("cluster"));
        assert_eq!(server.auth, "untrusted");
    }
}
