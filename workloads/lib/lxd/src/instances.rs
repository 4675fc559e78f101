//! Instances: making, starting, stopping, watching and removing them, and their files.

use std::{collections::BTreeMap, path::Path, time::Duration};

use bytes::Bytes;
use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Lxd, LxdError, Operation,
    call::{Call, TRANSFER_TIMEOUT, failed, part},
    images,
    server::nullable,
};

/// Largest file that is read from an instance, bytes: it is kept in memory.
const MAX_FILE_BYTES: usize = 64 * 1024 * 1024;

/// Settings by name.
type Config = BTreeMap<String, String>;
/// Settings of devices by name.
type Devices = BTreeMap<String, Config>;

/// What an instance is made of.
#[derive(Clone, Debug)]
pub enum Source {
    /// An image, by fingerprint.
    Image(String),
    /// Another instance of the project, without its snapshots.
    Instance(String),
}

/// An instance to be made.
#[derive(Clone, Debug)]
pub struct NewInstance {
    /// Unique name.
    pub name: String,
    /// What it is made of.
    pub source: Source,
    /// Settings: limits, our own keys.
    pub config: Config,
    /// Devices: root disk, network interface, GPU.
    pub devices: Devices,
    /// Profiles below them.
    pub profiles: Vec<String>,
}

/// An instance.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Instance {
    /// Unique name.
    pub name: String,
    /// `Running`, `Stopped`, `Frozen`, `Error`; where LXD has `instance_ready_state`, `Ready` too.
    pub status: String,
    /// The same as a number.
    pub status_code: u32,
    /// The member it is on.
    pub location: String,
    /// Its own settings.
    #[serde(deserialize_with = "nullable")]
    pub config: Config,
    /// Its own devices.
    #[serde(deserialize_with = "nullable")]
    pub devices: Devices,
    /// All settings, those of its profiles too.
    #[serde(deserialize_with = "nullable")]
    pub expanded_config: Config,
    /// All devices, those of its profiles too.
    #[serde(deserialize_with = "nullable")]
    pub expanded_devices: Devices,
    /// Profiles below them.
    #[serde(deserialize_with = "nullable")]
    pub profiles: Vec<String>,
    /// When it was made.
    pub created_at: String,
}

/// What an instance does now.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct InstanceState {
    /// As [`Instance::status`].
    pub status: String,
    /// The same as a number.
    pub status_code: u32,
    /// First process, as the machine sees it.
    pub pid: i64,
    /// Number of processes.
    pub processes: i64,
    /// Interfaces by name; none of a stopped one.
    #[serde(deserialize_with = "nullable")]
    pub network: BTreeMap<String, InterfaceState>,
}

/// An interface of an instance.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct InterfaceState {
    /// `up`.
    pub state: String,
    /// Its addresses.
    #[serde(deserialize_with = "nullable")]
    pub addresses: Vec<Address>,
}

/// An address of an interface.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Address {
    /// `inet`, `inet6`.
    pub family: String,
    /// The address.
    pub address: String,
    /// `global`, `link`, `local`.
    pub scope: String,
}

/// A change of what an instance does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StateAction {
    /// Start it.
    Start,
    /// Stop it.
    Stop,
    /// Stop and start it.
    Restart,
}

/// Whose a file is.
#[derive(Clone, Copy, Debug)]
pub struct FileOptions {
    /// Owner in the instance.
    pub uid: u32,
    /// Group in the instance.
    pub gid: u32,
    /// Permissions, such as `0o644`.
    pub mode: u32,
}

impl InstanceState {
    /// The first address of this family that others can reach.
    pub fn address(&self, family: &str) -> Option<&str> {
        let all = self.network.values().flat_map(|interface| &interface.addresses);
        all.filter(|address| address.family == family && address.scope == "global")
            .map(|address| address.address.as_str())
            .next()
    }
}

impl Lxd {
    /// Makes an instance on the target, stopped.
    ///
    /// # Errors
    /// The call fails; the operation fails with [`LxdError::is_exists`] when the name is taken.
    pub async fn create(&self, new: &NewInstance) -> Result<Operation, LxdError> {
        let source = match &new.source {
            Source::Image(fingerprint) => json!({ "type": "image", "fingerprint": fingerprint }),
            Source::Instance(name) => json!({ "type": "copy", "source": name, "instance_only": true }),
        };
        let body = json!({
            "name": new.name,
            "type": "container",
            "source": source,
            "config": new.config,
            "devices": new.devices,
            "profiles": new.profiles,
        });
        // The name goes first through the cluster, which may be slow while a member is lost.
        let call = Call::new(Method::POST, "/1.0/instances").json(&body);
        self.begin(call.timeout(Duration::from_secs(60))).await
    }

    /// An instance, and the tag of what was read.
    ///
    /// # Errors
    /// There is none, or the call fails.
    pub async fn instance(&self, name: &str) -> Result<(Instance, String), LxdError> {
        self.tagged(Call::new(Method::GET, &path(name, ""))).await
    }

    /// All instances of the project that have this key among their settings.
    ///
    /// # Errors
    /// The call fails.
    pub async fn instances(&self, key: &str) -> Result<Vec<Instance>, LxdError> {
        let call = Call::new(Method::GET, "/1.0/instances").query("recursion", 1);
        let mut all: Vec<Instance> = self.tagged(call).await?.0;
        all.retain(|instance| instance.config.contains_key(key));
        Ok(all)
    }

    /// All instances of the project. Of those whose member does not answer only name, place and the status `Error` are
    /// told.
    ///
    /// # Errors
    /// The call fails.
    pub async fn all_instances(&self) -> Result<Vec<Instance>, LxdError> {
        let call = Call::new(Method::GET, "/1.0/instances").query("recursion", 1);
        Ok(self.tagged(call).await?.0)
    }

    /// What an instance does now.
    ///
    /// # Errors
    /// There is none, or the call fails.
    pub async fn instance_state(&self, name: &str) -> Result<InstanceState, LxdError> {
        self.get(&path(name, "/state")).await
    }

    /// Changes what an instance does. After `timeout` a stop that is not forced fails; 0 waits for ever.
    ///
    /// # Errors
    /// The call fails.
    pub async fn change_state(
        &self,
        name: &str,
        action: StateAction,
        timeout: Duration,
        force: bool,
    ) -> Result<Operation, LxdError> {
        let body = json!({ "action": action, "timeout": timeout.as_secs(), "force": force });
        self.begin(Call::new(Method::PUT, &path(name, "/state")).json(&body)).await
    }

    /// Changes settings of an instance; those that are not named stay, and empty ones are removed. With a tag, only
    /// if nobody changed it since that was read.
    ///
    /// # Errors
    /// The call fails, or [`LxdError::is_precondition`].
    pub async fn patch_config(&self, name: &str, config: &Config, tag: Option<&str>) -> Result<(), LxdError> {
        let path = path(name, "");
        let mut call = Call::new(Method::PATCH, &path).json(&json!({ "config": config }));
        if let Some(tag) = tag {
            call = call.header("if-match", tag)?;
        }
        self.done(call).await
    }

    /// Deletes a stopped instance.
    ///
    /// # Errors
    /// There is none, or the call fails.
    pub async fn delete(&self, name: &str) -> Result<Operation, LxdError> {
        self.begin(Call::new(Method::DELETE, &path(name, ""))).await
    }

    /// Writes a file; its folder must be there.
    ///
    /// # Errors
    /// The call fails.
    pub async fn push_file(
        &self,
        instance: &str,
        file: &str,
        bytes: impl Into<Bytes>,
        options: FileOptions,
    ) -> Result<(), LxdError> {
        let path = path(instance, "/files");
        let call = Call::new(Method::POST, &path).body(bytes.into());
        self.done(owned(call.query("path", file), "file", options)?).await
    }

    /// Writes a file of this machine into an instance, and reads it while it is sent. A file that is there is replaced.
    ///
    /// # Errors
    /// It cannot be read, or the call fails.
    pub async fn push_path(
        &self,
        instance: &str,
        file: &str,
        from: &Path,
        options: FileOptions,
    ) -> Result<(), LxdError> {
        let path = path(instance, "/files");
        let body = reqwest::Body::wrap_stream(images::open(from).await?);
        let call = Call::new(Method::POST, &path).body(body).timeout(TRANSFER_TIMEOUT);
        self.done(owned(call.query("path", file), "file", options)?).await
    }

    /// Makes a symbolic link; its folder must be there. One that is there already is fine.
    ///
    /// # Errors
    /// The call fails.
    pub async fn push_link(&self, instance: &str, link: &str, target: &str) -> Result<(), LxdError> {
        let path = path(instance, "/files");
        let call = Call::new(Method::POST, &path).query("path", link).body(target.to_owned());
        let options = FileOptions { uid: 0, gid: 0, mode: 0o777 };
        match self.done(owned(call, "symlink", options)?).await {
            Err(error) if error.is_exists() => Ok(()),
            result => result,
        }
    }

    /// Makes a folder; its parent must be there. One that is there already is fine.
    ///
    /// # Errors
    /// The call fails.
    pub async fn make_folder(
        &self,
        instance: &str,
        folder: &str,
        options: FileOptions,
    ) -> Result<(), LxdError> {
        let path = path(instance, "/files");
        let call = Call::new(Method::POST, &path).query("path", folder);
        match self.done(owned(call, "directory", options)?).await {
            Err(error) if error.is_exists() => Ok(()),
            result => result,
        }
    }

    /// Reads a file of at most 64 MiB.
    ///
    /// # Errors
    /// There is none, it is a folder or too large, or the call fails.
    pub async fn read_file(&self, instance: &str, file: &str) -> Result<Bytes, LxdError> {
        let path = path(instance, "/files");
        self.bytes(Call::new(Method::GET, &path).query("path", file)).await
    }

    /// Removes a file. Not there is fine.
    ///
    /// # Errors
    /// The call fails.
    pub async fn delete_file(&self, instance: &str, file: &str) -> Result<(), LxdError> {
        let path = path(instance, "/files");
        match self.done(Call::new(Method::DELETE, &path).query("path", file)).await {
            Err(error) if error.is_not_found() => Ok(()),
            Err(LxdError::Refused { text, .. }) if text.contains("does not exist") => Ok(()),
            result => result,
        }
    }

    /// What the first process wrote to the console.
    ///
    /// # Errors
    /// There is none, or the call fails.
    pub async fn console_log(&self, instance: &str) -> Result<Bytes, LxdError> {
        match self.bytes(Call::new(Method::GET, &path(instance, "/console"))).await {
            // LXD 5.0 fails in this way when nothing was written yet: it opens a file without a name.
            Err(LxdError::Refused { text, .. }) if text.starts_with("open : no such file") => {
                Ok(Bytes::new())
            }
            result => result,
        }
    }

    /// Names of the logs that LXD keeps about an instance.
    ///
    /// # Errors
    /// The call fails.
    pub async fn logs(&self, instance: &str) -> Result<Vec<String>, LxdError> {
        let addresses: Vec<String> = self.get(&path(instance, "/logs")).await?;
        Ok(addresses.iter().filter_map(|address| address.rsplit('/').next()).map(str::to_owned).collect())
    }

    /// One of these logs.
    ///
    /// # Errors
    /// There is none, or the call fails.
    pub async fn log(&self, instance: &str, name: &str) -> Result<Bytes, LxdError> {
        let path = path(instance, &format!("/logs/{}", part(name)));
        self.bytes(Call::new(Method::GET, &path)).await
    }

    async fn bytes(&self, call: Call<'_>) -> Result<Bytes, LxdError> {
        let (mut response, name) = self.send(call.timeout(TRANSFER_TIMEOUT)).await?;
        let kind = response.headers().get("x-lxd-type").and_then(|kind| kind.to_str().ok());
        if let Some(kind) = kind.filter(|kind| *kind != "file") {
            return Err(LxdError::Invalid { what: "file to read", reason: format!("it is a {kind}") });
        }
        let mut bytes = Vec::new();
        while let Some(chunk) =
            response.chunk().await.map_err(|error| failed(&name, error, TRANSFER_TIMEOUT))?
        {
            if bytes.len() + chunk.len() > MAX_FILE_BYTES {
                let reason = format!("it is larger than {} MiB", MAX_FILE_BYTES >> 20);
                return Err(LxdError::Invalid { what: "file to read", reason });
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes.into())
    }
}

fn path(instance: &str, rest: &str) -> String {
    format!("/1.0/instances/{}{rest}", part(instance))
}

fn owned<'a>(call: Call<'a>, kind: &str, options: FileOptions) -> Result<Call<'a>, LxdError> {
    call.header("x-lxd-type", kind)?
        .header("x-lxd-uid", &options.uid.to_string())?
        .header("x-lxd-gid", &options.gid.to_string())?
        .header("x-lxd-mode", &format!("{:04o}", options.mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_that_others_reach_is_found() {
        let text = r#"{"status":"Running","status_code":103,"disk":{},"memory":{"usage":1},"network":{
            "eth0":{"addresses":[{"family":"inet","address":"10.155.0.20","netmask":"24","scope":"global"},
            {"family":"inet6","address":"fe80::1","netmask":"64","scope":"link"}],"state":"up","mtu":1500},
            "lo":{"addresses":[{"family":"inet","address":"127.0.0.1","netmask":"8","scope":"local"}]}},
            "pid":42,"processes":12,"cpu":{"usage":1}}"#;
        let state: InstanceState = serde_json::from_str(text).expect("as LXD writes it");
        assert_eq!(state.address("inet"), Some("10.155.0.20"));
        assert_eq!(state.address("inet6"), None);
        let stopped = r#"{"status":"Stopped","status_code":102,"network":null,"pid":0,"processes":-1}"#;
        let stopped: InstanceState = serde_json::from_str(stopped).expect("as LXD writes it");
        assert!(stopped.address("inet").is_none());
    }
}
