//! A simulated cluster: an agent whose messages are written by hand, and a table in the place of its AMS. Its sessions
//! cost nothing, so that a test can have many of them.
//!
//! It keeps to the rules of a real agent: reports of itself every 2 s, of all its sessions every 5 s and of changes at
//! once; the same launch again is the same instance; a session that has ended is not launched again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use async_nats::Client;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::interval};

/// The application that simulated clusters have.
pub const APPLICATION: &str = "simulated";
/// Instances that a simulated cluster takes.
const ROOM: usize = 1000;

/// A simulated cluster. Dropping it ends it without a word.
pub struct Simulated {
    /// Name of the agent.
    pub id: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    id: String,
    region: String,
    location: [f64; 2],
    table: Mutex<Table>,
}

/// What its AMS would know.
#[derive(Default)]
struct Table {
    instances: BTreeMap<String, Instance>,
    ended: BTreeSet<String>,
    /// How many instances were ever made.
    made: usize,
    changed: BTreeSet<String>,
    series: u64,
}

struct Instance {
    id: String,
    running: bool,
}

impl Simulated {
    /// Starts one; the bus may be away for a while later, not now.
    ///
    /// # Errors
    /// The bus is not there.
    pub async fn start(bus: Client, id: &str, region: &str, location: [f64; 2]) -> Result<Self> {
        let shared = Arc::new(Shared {
            id: id.to_owned(),
            region: region.to_owned(),
            location,
            table: Mutex::default(),
        });
        let requests = bus
            .queue_subscribe(format!("agents.{id}.requests"), "agent".to_owned())
            .await
            .context("subscribing to an agent's requests")?;
        let task = tokio::spawn(serve(shared.clone(), bus, requests));
        Ok(Self { id: id.to_owned(), shared, task })
    }

    /// Sessions that have an instance.
    pub fn sessions(&self) -> BTreeSet<String> {
        self.shared.table().instances.keys().cloned().collect()
    }

    /// How many instances were ever made.
    pub fn made(&self) -> usize {
        self.shared.table().made
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(shared: Arc<Shared>, bus: Client, mut requests: async_nats::Subscriber) {
    let mut itself = interval(Duration::from_secs(2));
    let mut whole = interval(Duration::from_secs(5));
    let mut life = interval(Duration::from_millis(100));
    loop {
        let mut said: Vec<(String, Value)> = Vec::new();
        tokio::select! {
            request = requests.next() => {
                let Some(request) = request else { return };
                let question: Value = serde_json::from_slice(&request.payload).unwrap_or_default();
                if let Some(answer) = shared.table().answer(&question)
                    && let Some(reply) = request.reply
                {
                    said.push((reply.to_string(), answer));
                }
                said.extend(shared.changes());
            }
            _ = itself.tick() => said.push(("agents.report".to_owned(), shared.report())),
            _ = whole.tick() => said.push(("sessions.report".to_owned(), shared.whole())),
            _ = life.tick() => {
                shared.table().start();
                said.extend(shared.changes());
            }
        }
        for (subject, message) in said {
            // A bus that is away takes it later, or never: both belong to its contract.
            let _ = bus.publish(subject, message.to_string().into()).await;
        }
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self) -> Value {
        let used = self.table().instances.len();
        json!({
            "version": 1, "agent_id": self.id, "incarnation": "1", "region": self.region, "cluster_id": self.id,
            "location": self.location, "ams_reachable": true,
            "applications": [{ "name": APPLICATION, "versions": [1], "published": 1 }],
            "capacity": { "instances": used, "free_instances": ROOM - used.min(ROOM) },
        })
    }

    fn sessions(&self, complete: bool, series: u64, sessions: Vec<Value>) -> Value {
        json!({
            "version": 1, "agent_id": self.id, "cluster_id": self.id, "complete": complete, "series": series,
            "part": 0, "parts": 1, "sessions": sessions,
        })
    }

    fn whole(&self) -> Value {
        let (series, sessions) = {
            let mut table = self.table();
            table.series += 1;
            (table.series, table.instances.keys().map(|session| table.state(session)).collect())
        };
        self.sessions(true, series, sessions)
    }

    fn changes(&self) -> Option<(String, Value)> {
        let sessions: Vec<Value> = {
            let mut table = self.table();
            let changed = std::mem::take(&mut table.changed);
            changed.iter().map(|session| table.state(session)).collect()
        };
        (!sessions.is_empty()).then(|| ("sessions.report".to_owned(), self.sessions(false, 0, sessions)))
    }
}

impl Table {
    fn answer(&mut self, question: &Value) -> Option<Value> {
        let session = question["session_id"].as_str()?.to_owned();
        let accepted = json!({ "type": "accepted", "stun_servers": [] });
        Some(match question["type"].as_str()? {
            "accept" if self.ended.contains(&session) => {
                json!({ "type": "refused", "code": "session-ended", "message": "the session has ended" })
            }
            "accept" => {
                if !self.instances.contains_key(&session) {
                    self.made += 1;
                    let id = format!("i-{session}-{}", self.made);
                    self.instances.insert(session.clone(), Instance { id, running: false });
                    self.changed.insert(session);
                }
                accepted
            }
            "credentials" => accepted,
            "end" => {
                self.instances.remove(&session);
                self.ended.insert(session.clone());
                self.changed.insert(session);
                json!({ "type": "ending", "state": "gone" })
            }
            _ => return None,
        })
    }

    /// What is starting runs.
    fn start(&mut self) {
        let Self { instances, changed, .. } = self;
        for (session, instance) in instances.iter_mut().filter(|(_, instance)| !instance.running) {
            instance.running = true;
            changed.insert(session.clone());
        }
    }

    fn state(&self, session: &str) -> Value {
        match self.instances.get(session) {
            Some(instance) => json!({
                "session_id": session, "instance_id": instance.id, "streamer_connected": instance.running,
                "state": if instance.running { "running" } else { "starting" },
            }),
            None => json!({ "session_id": session, "state": "gone" }),
        }
    }
}
