//! Pools: instances that are started before anybody asks for them. The unit that an application belongs to keeps its
//! pool filled, a launch of any unit takes from it, and the unit of the instance tells it whose it is.
//!
//! What should wait and who may have it is decided in [`crate::core::pool`]. That an instance is handed out once is the
//! doing of the store: a launch writes the instance's record in its own transaction, as it was when it waited or not at
//! all.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use fanlight_api::{ApplicationId, InstanceId, ams::InstancesPost, guest::ClaimAnswer};
use fanlight_store::{Compare, Op, Record, Revision, StoreError, StoreExt as _, encode};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Notify,
};

use crate::{
    Ams,
    core::{
        life::Phase,
        model::{ApplicationRecord, InstanceRecord, Target, key},
        placement::{Allocations, Wish},
        pool::{self, Backoff},
    },
    engine::{EngineError, Exec, Running},
    events::unix_now,
    instances::{Checked, InstanceError},
};

/// What hands a claim over in an instance; every instance has it in its `PATH`.
const CLAIM: [&str; 2] = ["fanlight-streamer", "claim"];
/// How long that may take.
const CLAIM_TIME: Duration = Duration::from_secs(15);
/// Most bytes of its answer.
const MAX_ANSWER: u64 = 64 * 1024;
/// Pools are looked at this often when nothing happens.
const TICK: Duration = Duration::from_secs(30);
/// Between two looks, however much happens.
const PAUSE: Duration = Duration::from_millis(50);
/// How long no more instances of a pool are made when there is no room for them.
const NO_ROOM: Duration = Duration::from_secs(10);
/// How often making one begins again when others were faster.
const ATTEMPTS: u32 = 16;

/// What pools and launches tell each other.
#[derive(Debug, Default)]
pub struct Pools {
    wake: Notify,
    wanting: AtomicUsize,
}

/// A launch waits for room; meanwhile no pool takes any.
pub struct Wanting(Ams);

impl Drop for Wanting {
    fn drop(&mut self) {
        self.0.pools.wanting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Pools {
    /// Something about a pool changed.
    pub fn wake(&self) {
        self.wake.notify_one();
    }
}

impl Ams {
    /// Keeps the pools of this unit's applications, for ever.
    pub(crate) async fn keep_pools(self) {
        let mut backoffs = HashMap::new();
        loop {
            let wait = match self.look_at_pools(&mut backoffs).await {
                Ok(wait) => wait,
                Err(error) => {
                    tracing::warn!("filling pools: {}", fanlight_service::telemetry::chain(&error));
                    Duration::from_secs(1)
                }
            };
            tokio::time::sleep(PAUSE).await;
            // A look too many costs little.
            let _ = tokio::time::timeout(wait, self.pools.wake.notified()).await;
        }
    }

    /// Looks at all pools once; gives how long to wait at most.
    async fn look_at_pools(
        &self,
        backoffs: &mut HashMap<ApplicationId, Backoff>,
    ) -> Result<Duration, InstanceError> {
        let records = self.index.list().await;
        let waiting = pool::by_application(records.iter().map(AsRef::as_ref));
        let applications = self.catalog.list().await?;
        let mut next = TICK;
        for application in &applications {
            if !self.is_ours(application.id.as_str()) {
                backoffs.remove(&application.id);
                continue;
            }
            let here = waiting.get(&application.id).map(Vec::as_slice).unwrap_or_default();
            if here.is_empty() && application.pool().is_none() {
                backoffs.remove(&application.id);
                continue;
            }
            let backoff = backoffs.entry(application.id.clone()).or_default();
            match self.look_at_pool(application, here, backoff).await {
                Ok(wait) => next = next.min(wait),
                Err(InstanceError::Store(error)) => return Err(error.into()),
                // One that cannot be launched is nothing to the others.
                Err(error) => tracing::warn!(
                    "filling the pool of application {}: {}",
                    application.name,
                    fanlight_service::telemetry::chain(&error)
                ),
            }
        }
        for (id, left) in &waiting {
            // What is not listed any more was deleted; its instances go with whom it belonged to.
            if self.is_ours(id.as_str()) && !applications.iter().any(|application| application.id == *id) {
                for record in left {
                    self.give_up(&record.id).await?;
                }
                backoffs.remove(id);
            }
        }
        Ok(next)
    }

    async fn look_at_pool(
        &self,
        application: &ApplicationRecord,
        waiting: &[&InstanceRecord],
        backoff: &mut Backoff,
    ) -> Result<Duration, InstanceError> {
        let size = application.pool().size;
        let template = match application.deleted || size == 0 || application.launchable(None).is_err() {
            true => None,
            false => Some(self.template(application).await?),
        };
        let plan = pool::plan(template.as_ref().map(|template| (&template.record, size)), waiting);
        for id in &plan.remove {
            self.give_up(id).await?;
        }
        let now = Instant::now();
        if plan.failed > 0 {
            backoff.failed(now);
            tracing::warn!(
                "{} waiting instances of application {} failed; more are made in {} s",
                plan.failed,
                application.name,
                backoff.wait(now).unwrap_or_default().as_secs()
            );
        }
        let Some(template) = template.filter(|_| plan.missing) else { return Ok(TICK) };
        if let Some(wait) = backoff.wait(now) {
            return Ok(wait);
        }
        for _ in 0..plan.make {
            if self.pools.wanting.load(Ordering::Acquire) > 0 {
                return Ok(Duration::from_secs(1));
            }
            if !self.make_waiting(application, &template).await? {
                tracing::debug!("no room for a waiting instance of application {}", application.name);
                backoff.pause(now, NO_ROOM);
                return Ok(NO_ROOM);
            }
        }
        Ok(TICK)
    }

    /// What waits for a launch is like the launch of somebody who asks for nothing.
    async fn template(&self, application: &ApplicationRecord) -> Result<Checked, InstanceError> {
        let post = InstancesPost { app_id: application.id.to_string(), ..InstancesPost::default() };
        let Checked { record, wish } = self.check_launch(post).await?;
        Ok(Checked { record: pool::waiting(record, application.pool().start), wish })
    }

    /// Makes one instance more, while the application is as it was. False: there is no room, or it has changed.
    async fn make_waiting(
        &self,
        application: &ApplicationRecord,
        template: &Checked,
    ) -> Result<bool, InstanceError> {
        let mut record = template.record.clone();
        record.id = InstanceId::generate();
        record.name = format!("ams-{}", record.id);
        let now = unix_now();
        (record.created_at, record.intent.since, record.observed.since) = (now, now, now);
        let _one = self.creating.lock().await;
        for _ in 0..ATTEMPTS {
            let application_key = key::application(&application.id);
            let Some(stored) = self.store.get_json::<ApplicationRecord>(&application_key).await? else {
                return Ok(false);
            };
            if stored.value != *application {
                self.pools.wake();
                return Ok(false);
            }
            let (key, name_key) = (key::instance(&record.id), key::instance_name(&record.name));
            let mut compares = vec![
                Compare::revision(&application_key, stored.revision),
                Compare::absent(&key),
                Compare::absent(&name_key),
            ];
            let mut ops = vec![Op::put(&name_key, encode(&name_key, &record.id)?)];
            match self.reserve(&template.wish, &record.id, &mut compares, &mut ops).await? {
                Ok(placed) => record.put(placed.node, placed.share),
                Err(_) => return Ok(false),
            }
            if self.give_ports(&mut record).await?.is_err() {
                return Ok(false);
            }
            ops.push(Op::put(&key, encode(&key, &record)?));
            match self.store.transact(compares, ops).await {
                Ok(_) => {}
                Err(StoreError::Conflict) => continue,
                Err(error) => return Err(error.into()),
            }
            tracing::info!(
                instance.id = %record.id,
                "instance {} was made for the pool of {}", record.id, application.name
            );
            self.reconcile(&record.id);
            return Ok(true);
        }
        Ok(false)
    }

    /// Removes an instance that waits; one that was claimed meanwhile stays.
    async fn give_up(&self, id: &InstanceId) -> Result<(), StoreError> {
        let key = key::instance(id);
        let Some(Record { value: mut record, revision }) =
            self.store.get_json::<InstanceRecord>(&key).await?
        else {
            return Ok(());
        };
        if !record.is_waiting() || record.intent.target == Target::Deleted {
            return Ok(());
        }
        record.intent = record.intent.delete(true, unix_now());
        let op = Op::put(&key, encode(&key, &record)?);
        match self.store.transact(vec![Compare::revision(&key, revision)], vec![op]).await {
            Ok(_) => self.nudge(id),
            Err(StoreError::Conflict) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    // --- launches ------------------------------------------------------------------------------------------------

    /// An instance for a launch, as it waits in the store; whether the launch gets it shows when the launch is written.
    pub(crate) async fn find_waiting(
        &self,
        launch: &InstanceRecord,
        wish: &Wish,
    ) -> Result<Option<Record<InstanceRecord>>, InstanceError> {
        let mut waiting = self.index.list().await;
        waiting.retain(|record| record.is_waiting() && record.application == launch.application);
        if waiting.is_empty() {
            return Ok(None);
        }
        let nodes = self.nodes.list().await?;
        let usable = pool::usable(wish, nodes.iter().map(|node| &node.offer));
        waiting.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        for known in waiting.iter().filter(|known| pool::can_have(known, launch, &usable)) {
            let Some(stored) = self.store.get_json::<InstanceRecord>(&key::instance(&known.id)).await? else {
                continue;
            };
            // What died a moment ago is in the record only when its unit has looked.
            let lives = self.engine.seen(&known.id).await.phase == Phase::Ready;
            if lives && pool::can_have(&stored.value, launch, &usable) {
                return Ok(Some(stored));
            }
        }
        Ok(None)
    }

    /// Gives waiting instances up for a launch that finds no room. None: that would not help.
    pub(crate) async fn make_room(&self, wish: &Wish) -> Result<Option<Wanting>, InstanceError> {
        let records = self.index.list().await;
        let waiting: Vec<&InstanceRecord> =
            records.iter().map(AsRef::as_ref).filter(|record| record.is_waiting()).collect();
        if waiting.is_empty() {
            return Ok(None);
        }
        let mut nodes = Vec::new();
        for node in self.nodes.list().await? {
            let key = key::allocations(&node.offer.node);
            let stored = self.store.get_json::<Allocations>(&key).await?;
            nodes.push((node.offer, stored.map(|stored| stored.value).unwrap_or_default()));
        }
        let Some(going) = pool::make_room(wish, self.settings.get().strategy, &nodes, &waiting) else {
            return Ok(None);
        };
        self.pools.wanting.fetch_add(1, Ordering::AcqRel);
        let wanting = Wanting(self.clone());
        for id in &going {
            tracing::info!(instance.id = %id, "waiting instance {id} makes room for a launch");
            self.give_up(id).await?;
        }
        Ok(Some(wanting))
    }

    // --- the instance --------------------------------------------------------------------------------------------

    /// Tells a waiting run what its launch asked for. The same again is fine, so it is done until it is known to be done.
    pub(crate) async fn claim(
        &self,
        record: &InstanceRecord,
        revision: Revision,
        watched: Duration,
    ) -> Result<Claimed, StoreError> {
        let (text, again) = match self.hand_over(record).await {
            Ok(ClaimAnswer { ok: true, .. }) => {
                let key = key::instance(&record.id);
                let next = InstanceRecord { pool: None, ..record.clone() };
                let put = Op::put(&key, encode(&key, &next)?);
                return match self.store.transact(vec![Compare::revision(&key, revision)], vec![put]).await {
                    Ok(_) => {
                        tracing::info!(instance.id = %record.id, "instance {} took its claim", record.id);
                        Ok(Claimed::Done)
                    }
                    // It is looked at again.
                    Err(StoreError::Conflict) => Ok(Claimed::Done),
                    Err(error) => Err(error),
                };
            }
            Ok(answer) => (answer.error.unwrap_or_else(|| "it did not say why".into()), answer.again),
            Err(error) => {
                let again = !matches!(error, EngineError::Unsupported(..));
                (fanlight_service::telemetry::chain(&error), again)
            }
        };
        let text = format!("the instance did not take its claim: {text}");
        if again && watched < self.config.engine.start_time {
            tracing::warn!(instance.id = %record.id, "instance {}: {text}", record.id);
            return Ok(Claimed::Again);
        }
        Ok(Claimed::Refused(text))
    }

    async fn hand_over(&self, record: &InstanceRecord) -> Result<ClaimAnswer, EngineError> {
        let refused = |reason: String| EngineError::Refused { doing: "handing the claim over", reason };
        let guest =
            serde_json::to_vec(&self.spec(record).await.guest).map_err(|error| refused(error.to_string()))?;
        let exec = Exec { command: CLAIM.map(String::from).into(), ..Exec::default() };
        let talk = async {
            let Running { mut stdin, stdout, stderr, control, ended } =
                self.engine.exec(&record.id, exec).await?;
            // Who ends before it has read everything says why.
            let _ = stdin.write_all(&guest).await;
            let _ = stdin.shutdown().await;
            drop(stdin);
            let (mut answer, mut complaint) = (Vec::new(), Vec::new());
            let complain = async {
                if let Some(stderr) = stderr {
                    let _ = stderr.take(MAX_ANSWER).read_to_end(&mut complaint).await;
                }
            };
            let mut stdout = stdout.take(MAX_ANSWER);
            let (read, ()) = tokio::join!(stdout.read_to_end(&mut answer), complain);
            let code = ended.await;
            drop(control);
            read.map_err(|error| refused(error.to_string()))?;
            serde_json::from_slice(&answer).map_err(|_| {
                let said = String::from_utf8_lossy(&complaint);
                let last =
                    said.trim().lines().last().unwrap_or_default().chars().take(200).collect::<String>();
                refused(match code {
                    Ok(code) => format!("{} ended with {code}: {last}", CLAIM.join(" ")),
                    Err(_) => format!("{} did not end: {last}", CLAIM.join(" ")),
                })
            })
        };
        match tokio::time::timeout(CLAIM_TIME, talk).await {
            Ok(answer) => answer,
            Err(_) => Err(refused(format!("no answer within {} s", CLAIM_TIME.as_secs()))),
        }
    }
}

/// How telling an instance whose it is went.
pub enum Claimed {
    /// Look at it again.
    Done,
    /// It can be tried again.
    Again,
    /// It will not have it.
    Refused(String),
}
