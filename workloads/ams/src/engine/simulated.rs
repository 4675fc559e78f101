//! An engine without processes, for tests of what stands above it. It follows a script and keeps to the same
//! contract as the real one.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use fanlight_api::{
    InstanceId,
    guest::{ClaimAnswer, EndReason, Ended, Guest},
};
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::{broadcast, mpsc, oneshot},
};

use super::{Control, Engine, EngineError, Exec, Machine, Running, Spec, SpecAddon};
use crate::core::life::{Phase, Seen};

/// What simulated instances do after their start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Script {
    /// Ready at once, run until stopped.
    Run,
    /// Never ready.
    Hang,
    /// Ready, then fail.
    Crash,
    /// Ready at once, and no claim is taken.
    Refuse,
}

/// The engine. Clones are handles of the same.
#[derive(Clone, Debug)]
pub struct SimulatedEngine {
    script: Script,
    instances: Arc<Mutex<BTreeMap<InstanceId, Seen>>>,
    /// SHA-256 of the images that it has; none: it has no images.
    images: Option<Arc<Mutex<BTreeSet<String>>>>,
    /// How many machines it says there are.
    machines: usize,
    /// What was run in instances.
    ran: Arc<Mutex<Vec<Vec<String>>>>,
    /// The addons that instances were made with.
    addons: Arc<Mutex<BTreeMap<InstanceId, Vec<SpecAddon>>>>,
    /// The claims that instances took.
    claims: Arc<Mutex<BTreeMap<InstanceId, Guest>>>,
    changes: broadcast::Sender<InstanceId>,
}

impl SimulatedEngine {
    /// An empty engine.
    pub fn new(script: Script) -> Self {
        Self {
            script,
            instances: Arc::default(),
            images: None,
            machines: 1,
            ran: Arc::default(),
            addons: Arc::default(),
            claims: Arc::default(),
            changes: broadcast::Sender::new(1024),
        }
    }

    /// The same, whose instances are made of images. A file that begins with `broken` is none.
    #[must_use]
    pub fn with_images(self) -> Self {
        Self { images: Some(Arc::default()), ..self }
    }

    /// The same, of this many machines: `local`, `local1`, …
    #[must_use]
    pub fn with_machines(self, machines: usize) -> Self {
        Self { machines, ..self }
    }

    /// The images that it has.
    pub fn images(&self) -> BTreeSet<String> {
        let images = self.images.as_ref();
        images.map(|images| images.lock().unwrap_or_else(PoisonError::into_inner).clone()).unwrap_or_default()
    }

    /// What was run in instances so far.
    pub fn ran(&self) -> Vec<Vec<String>> {
        self.ran.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The addons that an instance was made with.
    pub fn addons(&self, id: &InstanceId) -> Vec<SpecAddon> {
        self.addons.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned().unwrap_or_default()
    }

    /// The claim that an instance took.
    pub fn claim(&self, id: &InstanceId) -> Option<Guest> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// What a streamer that waits answers to a claim.
    fn answer(&self, id: &InstanceId, claim: &[u8]) -> ClaimAnswer {
        let refused = |error: &str| ClaimAnswer { ok: false, error: Some(error.into()), again: false };
        let Ok(claim) = serde_json::from_slice::<Guest>(claim) else { return refused("it is no claim") };
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        match claims.get(id) {
            _ if self.script == Script::Refuse => return refused("refused as the script says"),
            Some(known) if *known != claim => {
                return refused("this instance was claimed for another session");
            }
            _ => drop(claims.insert(id.clone(), claim)),
        }
        ClaimAnswer { ok: true, error: None, again: false }
    }

    /// Changes an instance from outside, as a crash would.
    pub fn set(&self, id: &InstanceId, seen: Seen) {
        if seen == Seen::ABSENT {
            self.lock().remove(id);
        } else {
            self.lock().insert(id.clone(), seen);
        }
        // Nobody listening is fine.
        let _ = self.changes.send(id.clone());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<InstanceId, Seen>> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn phase(&self, id: &InstanceId, phase: Phase) {
        let run = self.lock().get(id).map_or(0, |seen| seen.run);
        self.set(id, Seen { run, phase });
    }
}

#[async_trait]
impl Engine for SimulatedEngine {
    fn is_shared(&self) -> bool {
        true
    }

    async fn machines(&self) -> Result<Vec<Machine>, EngineError> {
        let machine = |number: usize| Machine {
            name: if number == 0 { "local".into() } else { format!("local{number}") },
            address: "127.0.0.1".into(),
            online: true,
            leader: number == 0,
            architecture: std::env::consts::ARCH.into(),
            cpus: 1 << 20,
            memory_bytes: 1 << 50,
            places: u32::MAX,
            ..Machine::default()
        };
        Ok((0..self.machines).map(machine).collect())
    }

    fn has_images(&self) -> bool {
        self.images.is_some()
    }

    async fn import_image(&self, sha256: &str, file: &Path) -> Result<(), EngineError> {
        let content = std::fs::read(file).map_err(|error| EngineError::io("reading", file, error))?;
        let Some(images) = &self.images else { return Err(EngineError::Unsupported("images", "no images")) };
        if content.starts_with(b"broken") {
            return Err(EngineError::Refused {
                doing: "importing the image",
                reason: "it is damaged".into(),
            });
        }
        images.lock().unwrap_or_else(PoisonError::into_inner).insert(sha256.to_owned());
        Ok(())
    }

    async fn delete_image(&self, sha256: &str) -> Result<(), EngineError> {
        if let Some(images) = &self.images {
            images.lock().unwrap_or_else(PoisonError::into_inner).remove(sha256);
        }
        Ok(())
    }

    async fn publish(&self, id: &InstanceId) -> Result<String, EngineError> {
        let Some(images) = &self.images else { return Err(EngineError::Unsupported("images", "no images")) };
        if self.seen(id).await.phase.is_live() {
            return Err(EngineError::Refused { doing: "publishing", reason: format!("instance {id} runs") });
        }
        let sha256 = hex::encode(Sha256::digest(id.as_str()));
        images.lock().unwrap_or_else(PoisonError::into_inner).insert(sha256.clone());
        Ok(sha256)
    }

    /// `echo` says its arguments, `cat` says what it reads, `false` ends with 1, and `sleep` ends by a signal only. Every
    /// other program reads its input to the end and ends with 0, but one whose name ends with `post-start` complains and
    /// ends with 3. `fanlight-streamer claim` answers as the script says.
    async fn exec(&self, id: &InstanceId, exec: Exec) -> Result<Running, EngineError> {
        if !self.seen(id).await.phase.is_live() {
            return Err(EngineError::NotRunning(id.clone()));
        }
        self.ran.lock().unwrap_or_else(PoisonError::into_inner).push(exec.command.clone());
        let (stdin, mut input) = tokio::io::duplex(4096);
        let (stdout, mut output) = tokio::io::duplex(4096);
        let (stderr, mut complaint) = tokio::io::duplex(4096);
        let (control, mut controls) = mpsc::channel(16);
        let (end, ended) = oneshot::channel();
        let terminal = exec.terminal.is_some();
        let (engine, id) = (self.clone(), id.clone());
        tokio::spawn(async move {
            let mut words = exec.command.iter();
            let program = words.next().map_or("", String::as_str);
            let run = async {
                match program {
                    "echo" => {
                        let text = words.cloned().collect::<Vec<_>>().join(" ");
                        let _ = output.write_all(format!("{text}\n").as_bytes()).await;
                        0
                    }
                    "cat" => i32::from(tokio::io::copy(&mut input, &mut output).await.is_err()),
                    "false" => 1,
                    "fanlight-streamer" => {
                        let mut claim = Vec::new();
                        let _ = input.read_to_end(&mut claim).await;
                        let answer = engine.answer(&id, &claim);
                        let _ = output.write_all(serde_json::json!(answer).to_string().as_bytes()).await;
                        i32::from(!answer.ok)
                    }
                    "sleep" => std::future::pending().await,
                    _ => {
                        let _ = tokio::io::copy(&mut input, &mut tokio::io::sink()).await;
                        let fails = program.ends_with("post-start");
                        if fails {
                            let _ = complaint.write_all(b"it fails").await;
                        }
                        if fails { 3 } else { 0 }
                    }
                }
            };
            let told = async {
                loop {
                    match controls.recv().await {
                        Some(Control::Resize(..)) => {}
                        Some(Control::Signal(number)) => return 128 + number,
                        Some(Control::HangUp) => return 129,
                        None => return std::future::pending().await,
                    }
                }
            };
            let code = tokio::select! { code = run => code, code = told => code };
            drop((output, complaint));
            // Nobody waiting is fine.
            let _ = end.send(code);
        });
        Ok(Running {
            stdin: Box::pin(stdin),
            stdout: Box::pin(stdout),
            stderr: (!terminal)
                .then(|| -> std::pin::Pin<Box<dyn tokio::io::AsyncRead + Send>> { Box::pin(stderr) }),
            control,
            ended,
        })
    }

    async fn create(&self, spec: &Spec) -> Result<(), EngineError> {
        self.addons
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(spec.id().clone(), spec.addons.clone());
        if !self.lock().contains_key(spec.id()) {
            self.set(spec.id(), Seen { run: 0, phase: Phase::Idle });
        }
        Ok(())
    }

    async fn start(&self, id: &InstanceId, run: u32) -> Result<(), EngineError> {
        let before = self.lock().get(id).cloned().ok_or_else(|| EngineError::Absent(id.clone()))?;
        if before.run >= run {
            return Ok(());
        }
        self.set(id, Seen { run, phase: Phase::Starting });
        match self.script {
            Script::Hang => {}
            Script::Run | Script::Refuse => self.phase(id, Phase::Ready),
            Script::Crash => {
                self.phase(id, Phase::Ready);
                let ended = Ended { reason: EndReason::Failed, message: "crashed as the script says".into() };
                self.phase(id, Phase::Ended(ended));
            }
        }
        Ok(())
    }

    async fn stop(&self, id: &InstanceId, grace: Duration) {
        let live = self.lock().get(id).is_some_and(|seen| seen.phase.is_live());
        if live {
            let message = if grace.is_zero() { "killed" } else { "stopped" };
            self.phase(id, Phase::Ended(Ended { reason: EndReason::Stopped, message: message.into() }));
        }
    }

    async fn delete(&self, id: &InstanceId) -> Result<(), EngineError> {
        self.set(id, Seen::ABSENT);
        Ok(())
    }

    async fn seen(&self, id: &InstanceId) -> Seen {
        self.lock().get(id).cloned().unwrap_or(Seen::ABSENT)
    }

    async fn status(&self, _: &InstanceId) -> String {
        String::new()
    }

    async fn list(&self) -> Result<Vec<InstanceId>, EngineError> {
        Ok(self.lock().keys().cloned().collect())
    }

    async fn logs(&self, id: &InstanceId) -> Vec<String> {
        let there = self.lock().contains_key(id);
        there.then(|| "streamer.log".to_owned()).into_iter().collect()
    }

    async fn read_log(&self, id: &InstanceId, name: &str) -> Result<Vec<u8>, EngineError> {
        if !self.lock().contains_key(id) || name != "streamer.log" {
            return Err(EngineError::NoLog(name.into()));
        }
        Ok(b"simulated\n".to_vec())
    }

    fn changes(&self) -> broadcast::Receiver<InstanceId> {
        self.changes.subscribe()
    }
}
