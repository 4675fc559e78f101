//! Making a version of an application where instances are made of images (ams-model section 2.3): a helper instance
//! takes the package in and runs its hooks, is stopped, becomes an image, and is thrown away. When something fails the
//! helper stays, with its logs, until the version is deleted or somebody deletes it.
//!
//! Each step can be done again, so a version that was being made when AMS ended is gone on with.

use std::{
    io::{self, Seek as _},
    path::{Path, PathBuf},
    time::Duration,
};

use fanlight_api::{ApplicationId, InstanceId, OperationId, ams::InstanceStatus, guest::ADDONS};
use fanlight_store::{Record, StoreError, StoreExt as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use crate::{
    Ams,
    core::model::{ApplicationRef, InstanceRecord, OperationRecord, VersionRecord, VersionState, key},
    engine::{EngineError, Exec},
    events::unix_now,
};

/// How long making a version may take.
const LIMIT: Duration = Duration::from_secs(15 * 60);
/// How long the helper may take to stop.
const STOP: Duration = Duration::from_secs(60);
/// Where the package lies in an instance.
pub const APP_DIR: &str = "/var/lib/fanlight/app";
/// Where the files of an instance lie.
const GUEST_DIR: &str = "/var/lib/fanlight";
/// Most bytes of what a hook said that are told.
const TOLD: usize = 2000;

/// What is put into the helper.
struct Part {
    /// For people.
    what: String,
    /// Where it goes.
    place: String,
    /// Where it is.
    package: PathBuf,
    /// How long one of its hooks may take.
    hook_time: Duration,
    is_addon: bool,
}

impl Ams {
    /// Begins with the versions that an upload brought, on behalf of its operation.
    pub(crate) async fn make_new_versions(&self, operation: &OperationRecord) -> Result<(), StoreError> {
        if operation.operation.is_final() {
            return Ok(());
        }
        let Some(id) = operation.operation.resource("applications") else { return Ok(()) };
        for (application, number) in self.catalog.unfinished().await? {
            if application.as_str() == id {
                self.make_version(application, number, Some(operation.operation.id.clone()));
            }
        }
        Ok(())
    }

    /// Goes on with making a version, for as long as it takes.
    pub(crate) fn make_version(&self, id: ApplicationId, number: u32, operation: Option<OperationId>) {
        let ams = self.clone();
        self.shutdown.spawn_until_stopped("bootstrap", async move {
            let made = match timeout(LIMIT, ams.make(&id, number)).await {
                Ok(made) => made,
                Err(_) => Err(format!("making the version took longer than {} min", LIMIT.as_secs() / 60)),
            };
            if let Err(error) = &made {
                tracing::warn!("application {id} version {number}: {error}");
                let state = VersionState::Failed { error: error.clone() };
                if let Err(error) = ams.catalog.set_state(&id, number, &state, None).await {
                    tracing::warn!("noting that application {id} version {number} failed: {error}");
                }
            }
            if let Some(operation) = operation
                && let Err(error) = ams.operations.finish(&operation, made).await
            {
                tracing::warn!("ending the operation of application {id}: {error}");
            }
        });
    }

    async fn make(&self, id: &ApplicationId, number: u32) -> Result<(), String> {
        let record = self.catalog.find(id.as_str()).await.map_err(|error| error.to_string())?.value;
        let version = record.versions.get(&number).ok_or("the version was deleted")?;
        let VersionState::Building { base } = &version.state else { return Ok(()) };
        let known = match base {
            Some(base) if self.base(base).await?.is_some() => Some(base.clone()),
            _ => None,
        };
        let base = match known {
            Some(base) => base,
            None => {
                let application =
                    ApplicationRef { id: id.clone(), name: record.name.clone(), version: number };
                let base = self
                    .create_base(&application, version, record.selector())
                    .await
                    .map_err(|error| error.to_string())?;
                let state = VersionState::Building { base: Some(base.clone()) };
                self.catalog.set_state(id, number, &state, None).await.map_err(|error| error.to_string())?;
                base
            }
        };
        self.until(&base, "start", |status| status == InstanceStatus::Running).await?;
        let mut parts = Vec::new();
        for addon in &version.addons {
            parts.push(Part {
                what: format!("addon {}", addon.name),
                place: format!("{GUEST_DIR}/{ADDONS}/{}", addon.name),
                package: self.addons.package_here(addon).await.map_err(|error| error.to_string())?,
                hook_time: Duration::from_secs(addon.hook_time_s),
                is_addon: true,
            });
        }
        // After the addons, as its hooks are.
        parts.push(Part {
            what: "application".into(),
            place: APP_DIR.into(),
            package: self.catalog.package_here(id, number).await.map_err(|error| error.to_string())?,
            hook_time: version.manifest.hook_time(),
            is_addon: false,
        });
        for part in &parts {
            self.fill(&base, part).await?;
        }
        for hook in ["pre-start", "post-start"] {
            for part in &parts {
                self.hook(&base, part, hook).await?;
            }
        }
        self.prune(&base, version).await?;
        self.stop_base(&base).await?;
        let sha256 = self
            .engine
            .publish(&base)
            .await
            .map_err(|error| format!("making an image of the instance: {}", chain(&error)))?;
        let state = VersionState::Active;
        self.catalog.set_state(id, number, &state, Some(&sha256)).await.map_err(|error| error.to_string())?;
        tracing::info!("application {} version {number} can be launched", record.name);
        if let Err(error) = self.delete_instance(base.as_str(), true).await {
            tracing::warn!(instance.id = %base, "removing the base instance {base}: {error}");
        }
        Ok(())
    }

    async fn base(&self, id: &InstanceId) -> Result<Option<InstanceRecord>, String> {
        let stored: Option<Record<InstanceRecord>> =
            self.store.get_json(&key::instance(id)).await.map_err(|error| error.to_string())?;
        Ok(stored.map(|stored| stored.value))
    }

    /// Waits for a status of the helper.
    async fn until(
        &self,
        id: &InstanceId,
        what: &str,
        reached: impl Fn(InstanceStatus) -> bool,
    ) -> Result<(), String> {
        let mut events = self.events.subscribe();
        loop {
            let record = self.base(id).await?.ok_or_else(|| format!("base instance {id} was deleted"))?;
            if reached(record.observed.status) {
                return Ok(());
            }
            if record.observed.status == InstanceStatus::Error {
                return Err(format!("base instance {id}: {}", record.observed.error));
            }
            if record.observed.status == InstanceStatus::Stopped {
                return Err(format!("base instance {id} ended before its {what}"));
            }
            // An event that was missed costs a second.
            let _ = timeout(Duration::from_secs(1), events.recv()).await;
        }
    }

    /// Puts a package into the helper, as a stream of an archive.
    async fn fill(&self, id: &InstanceId, part: &Part) -> Result<(), String> {
        let step = |text: String| format!("placing the {} in base instance {id}: {text}", part.what);
        let (place, package, inside) = (self.config.folder.clone(), part.package.clone(), &part.place);
        let archive = tokio::task::spawn_blocking(move || {
            let mut archive = tar::Builder::new(tempfile::tempfile_in(place)?);
            // Links are kept as links: they were checked when the package was unpacked.
            archive.follow_symlinks(false);
            archive.mode(tar::HeaderMode::Deterministic);
            archive.append_dir_all(".", &package)?;
            let mut file = archive.into_inner()?;
            file.rewind()?;
            io::Result::Ok(file)
        });
        let archive = archive.await.map_err(|error| step(error.to_string()))?;
        let mut archive = tokio::fs::File::from_std(archive.map_err(|error| step(error.to_string()))?);
        // The place is an argument, never text of the script.
        let script = "mkdir -p \"$0\" && exec tar -x --no-same-owner -C \"$0\" -f -";
        let command = vec!["sh".into(), "-c".into(), script.into(), inside.clone()];
        let exec = Exec { command, ..Exec::default() };
        let mut running = self.engine.exec(id, exec).await.map_err(|error| step(chain(&error)))?;
        let copied = tokio::io::copy(&mut archive, &mut running.stdin).await;
        let _ = running.stdin.shutdown().await;
        drop(running.stdin);
        let mut said = String::new();
        if let Some(stderr) = running.stderr.take() {
            let _ = stderr.take(TOLD as u64).read_to_string(&mut said).await;
        }
        let code = running.ended.await.unwrap_or(-1);
        if code != 0 {
            return Err(step(format!("tar ended with {code}: {}", said.trim())));
        }
        copied.map(drop).map_err(|error| step(error.to_string()))
    }

    async fn hook(&self, id: &InstanceId, part: &Part, name: &str) -> Result<(), String> {
        let hooks = part.package.join("hooks");
        // What older addons call it (ams-model section 5).
        let older = match name {
            "pre-start" if part.is_addon => "install",
            "post-start" if part.is_addon => "prepare",
            _ => name,
        };
        let Some(file) = [name, older].into_iter().find(|file| is_executable(&hooks.join(file))) else {
            return Ok(());
        };
        let limit = part.hook_time;
        let mut environment = vec![
            ("APP_DIR", APP_DIR),
            ("ANBOX_DIR", GUEST_DIR),
            ("INSTANCE_TYPE", "base"),
            ("CONTAINER_TYPE", "base"),
            ("HOME", "/root"),
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ];
        if part.is_addon {
            environment.push(("ADDON_DIR", part.place.as_str()));
        }
        let exec = Exec {
            command: vec![format!("{}/hooks/{file}", part.place)],
            environment: environment
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            terminal: None,
        };
        let whose = if part.is_addon { format!(" of {}", part.what) } else { String::new() };
        let step = |text: String| format!("hook {name}{whose} failed: {text}");
        tracing::info!(instance.id = %id, "running the hook {name} in base instance {id}");
        let running = self.engine.exec(id, exec).await.map_err(|error| step(chain(&error)))?;
        let (code, said) = timeout(limit, finish(running))
            .await
            .map_err(|_| step(format!("it took longer than {} s (hooks.timeout)", limit.as_secs())))?;
        match code {
            0 => Ok(()),
            code => Err(step(format!("it ended with {code}: {said}"))),
        }
    }

    /// Removes what the manifest does not keep.
    async fn prune(&self, id: &InstanceId, version: &VersionRecord) -> Result<(), String> {
        if version.manifest.keep.is_empty() {
            return Ok(());
        }
        // The patterns are arguments, never text of the script.
        let script = "cd \"$0\" || exit 1\n\
             find . -mindepth 1 ! -type d | while IFS= read -r file; do\n\
             keep=; case ${file#./} in manifest.yaml|hooks/*) keep=1;; esac\n\
             for pattern in \"$@\"; do case ${file#./} in $pattern|$pattern/*) keep=1;; esac; done\n\
             [ -n \"$keep\" ] || rm -f -- \"$file\"; done\n\
             find . -mindepth 1 -type d -empty -delete";
        let mut command = vec!["sh".to_owned(), "-c".into(), script.into(), APP_DIR.into()];
        command.extend(version.manifest.keep.iter().cloned());
        let exec = Exec { command, ..Exec::default() };
        let running = self.engine.exec(id, exec).await.map_err(|error| chain(&error))?;
        match finish(running).await {
            (0, _) => Ok(()),
            (code, said) => Err(format!("keeping bootstrap.keep ended with {code}: {said}")),
        }
    }

    async fn stop_base(&self, id: &InstanceId) -> Result<(), String> {
        self.store
            .update_json::<InstanceRecord, _, _>(&key::instance(id), |record| {
                let mut record = record?;
                record.intent = record.intent.stop(unix_now());
                Some(record)
            })
            .await
            .map_err(|error| error.to_string())?;
        self.nudge(id);
        let mut events = self.events.subscribe();
        let stopped = async {
            loop {
                match self.base(id).await?.map(|record| record.observed.status) {
                    None => return Err(format!("base instance {id} was deleted")),
                    Some(InstanceStatus::Stopped | InstanceStatus::Error) => return Ok(()),
                    Some(_) => {}
                }
                let _ = timeout(Duration::from_secs(1), events.recv()).await;
            }
        };
        timeout(STOP, stopped)
            .await
            .unwrap_or_else(|_| Err(format!("base instance {id} did not stop within {} s", STOP.as_secs())))
    }
}

/// As the hooks of an instance are run: what cannot be executed is no hook.
fn is_executable(hook: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(hook).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// Waits for the end of a program, and gives its status and the end of what it said.
async fn finish(running: crate::engine::Running) -> (i32, String) {
    drop(running.stdin);
    let (mut out, mut error) = (Vec::new(), Vec::new());
    let mut stdout = running.stdout;
    match running.stderr {
        Some(mut stderr) => {
            let _ = tokio::join!(last(&mut stdout, &mut out), last(&mut stderr, &mut error));
        }
        None => last(&mut stdout, &mut out).await,
    }
    let code = running.ended.await.unwrap_or(-1);
    let said = if error.is_empty() { out } else { error };
    (code, String::from_utf8_lossy(&said).trim().to_owned())
}

/// Reads to the end and keeps the last bytes.
async fn last(from: &mut (impl tokio::io::AsyncRead + Unpin), kept: &mut Vec<u8>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        kept.extend_from_slice(&buffer[..count]);
        let surplus = kept.len().saturating_sub(TOLD);
        kept.drain(..surplus);
    }
}

fn chain(error: &EngineError) -> String {
    fanlight_service::telemetry::chain(error)
}
