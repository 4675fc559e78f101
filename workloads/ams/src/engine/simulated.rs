//! An engine without processes, for tests of what stands above it. It follows a script and keeps to the same
//! contract as the real one.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use fanlight_api::{
    InstanceId,
    guest::{EndReason, Ended},
};
use tokio::sync::broadcast;

use super::{Engine, EngineError, Spec};
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
}

/// The engine. Clones are handles of the same.
#[derive(Clone, Debug)]
pub struct SimulatedEngine {
    script: Script,
    instances: Arc<Mutex<BTreeMap<InstanceId, Seen>>>,
    changes: broadcast::Sender<InstanceId>,
}

impl SimulatedEngine {
    /// An empty engine.
    pub fn new(script: Script) -> Self {
        Self { script, instances: Arc::default(), changes: broadcast::Sender::new(1024) }
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
    async fn create(&self, spec: &Spec) -> Result<(), EngineError> {
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
            Script::Run => self.phase(id, Phase::Ready),
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
