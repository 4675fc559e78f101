//! What is known of the containers, and how it becomes known: read once, then told by events. Asks an instance that was
//! started to say when it is ready, with a program in it that waits.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Weak, atomic::Ordering},
    time::{Duration, Instant},
};

use fanlight_api::{
    InstanceId,
    guest::{EndReason, Ended, GUEST_DIR, GuestPhase, GuestState, STATE_FILE},
};
use fanlight_lxd::{ClusterMember, Events, Instance, LxdError, Signal};
use futures_util::{StreamExt as _, stream};

use super::{BASE, Inner, OURS, PREFIX, READY, RUN, STARTED, STOPPED, exec, lock, name, network};
use crate::core::life::{Phase, Seen};

/// Containers that are looked at at a time.
const AT_ONCE: usize = 8;
/// Removed containers that are remembered, so that an older look does not bring them back.
const MOST_REMOVED: usize = 4096;
/// Between looks at the members of a cluster.
const MEMBERS: Duration = Duration::from_secs(10);
/// How long a member may be offline until its instances are given up. LXD waits 20 s before it calls one offline.
const LOST: Duration = Duration::from_secs(20);
/// Between attempts to ask an instance whether it is ready.
const AGAIN: Duration = Duration::from_millis(200);
/// Most bytes of what an instance says of itself.
const MOST: u64 = 64 * 1024;
/// Exit statuses of programs that are not there or cannot be run.
const NO_PROGRAM: [i32; 2] = [126, 127];
/// Waits until the system of a helper has booted.
const BOOTED: &str = "for i in $(seq 300); do case $(systemctl is-system-running 2>/dev/null) in \
    running|degraded) exit 0;; esac; sleep 0.1; done";

/// What is known of a container.
#[derive(Debug)]
pub struct Entry {
    /// The member it is on.
    pub node: String,
    /// Its address.
    pub address: Option<Ipv4Addr>,
    /// How far it is.
    pub seen: Seen,
    /// What its streamer says.
    pub status: String,
    /// It is being ended; by force?
    pub ending: Option<bool>,
    /// The look that this was learned by.
    look: u64,
    /// Held while keys of it are changed.
    pub notes: Arc<tokio::sync::Mutex<()>>,
    base: bool,
    /// Somebody waits for it to be ready.
    following: bool,
}

/// A member of a cluster.
#[derive(Debug)]
pub struct Member {
    /// Where it listens.
    pub address: Option<IpAddr>,
    /// Since when it is offline.
    lost: Option<Instant>,
}

impl Member {
    /// It answers, as far as is known.
    pub fn is_there(&self) -> bool {
        self.lost.is_none()
    }
}

/// The keys of a container.
#[derive(Clone, Copy, Debug, Default)]
struct Keys {
    run: u32,
    started: u32,
    ready: u32,
    stopped: u32,
}

impl Keys {
    fn of(instance: &Instance) -> Self {
        let key = |key: &str| instance.config.get(key).and_then(|run| run.parse().ok()).unwrap_or_default();
        Self { run: key(RUN), started: key(STARTED), ready: key(READY), stopped: key(STOPPED) }
    }

    /// Of a container that runs.
    fn live(self) -> Phase {
        match self.run {
            0 => Phase::Idle,
            run if run == self.stopped => Phase::Stopping,
            run if run == self.ready => Phase::Ready,
            _ => Phase::Starting,
        }
    }

    /// Of a container that does not run. `state`: what was last said in it.
    fn at_rest(self, state: Option<GuestState>) -> Seen {
        let ended = |reason, message: &str| Phase::Ended(Ended { reason, message: message.into() });
        let phase = match state {
            _ if self.run == 0 => Phase::Idle,
            Some(GuestState { run, phase: GuestPhase::Ended(ended), .. }) if run == self.run => {
                Phase::Ended(ended)
            }
            _ if self.stopped == self.run => ended(EndReason::Stopped, "stopped"),
            _ if self.started == self.run => ended(
                EndReason::Failed,
                "the container ended and nothing in it said why; console.log may say more",
            ),
            // Asked for and never begun.
            _ => return Seen { run: self.run - 1, phase: Phase::Idle },
        };
        Seen { run: self.run, phase }
    }
}

fn id_of(name: &str) -> Option<InstanceId> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

impl Inner {
    /// How far an instance is. Who asks looks after it, so somebody waits for it from now on.
    pub(super) fn seen(self: &Arc<Self>, id: &InstanceId) -> Seen {
        let mut entries = lock(&self.entries);
        let Some(entry) = entries.get_mut(id) else { return Seen::ABSENT };
        if entry.seen.phase == Phase::Starting && !entry.following {
            entry.following = true;
            let (inner, id, run, base) = (self.clone(), id.clone(), entry.seen.run, entry.base);
            tokio::spawn(async move {
                inner.wait_until_ready(&id, run, base).await;
                if let Some(entry) = lock(&inner.entries).get_mut(&id) {
                    entry.following = false;
                }
            });
        }
        entry.seen.clone()
    }

    async fn wait_until_ready(&self, id: &InstanceId, run: u32, base: bool) {
        let number = run.to_string();
        let command: &[&str] = match base {
            true => &["sh", "-c", BOOTED],
            false => &["fanlight-streamer", "guest", "wait", "--run", &number],
        };
        loop {
            match exec::capture(&self.lxd, &name(id), command, MOST).await {
                Ok((0, said)) if !base => match serde_json::from_slice::<GuestState>(&said) {
                    Ok(state) if state.phase == GuestPhase::Ready => {
                        return self.is_ready(id, run, state.status).await;
                    }
                    // It is about to go down, which will be told.
                    Ok(_) => return,
                    Err(error) => {
                        tracing::debug!(instance.id = %id, "instance {id} said something odd: {error}");
                    }
                },
                // An image without a streamer is ready when it runs.
                Ok((code, _)) if base || NO_PROGRAM.contains(&code) => {
                    return self.is_ready(id, run, String::new()).await;
                }
                Ok((code, _)) => {
                    tracing::debug!(instance.id = %id, "waiting in instance {id} ended with {code}");
                }
                Err(error) => tracing::debug!(instance.id = %id, "waiting in instance {id}: {error}"),
            }
            tokio::time::sleep(AGAIN).await;
            self.look(id).await;
            let entries = lock(&self.entries);
            let waits = |entry: &&Entry| entry.seen.run == run && entry.seen.phase == Phase::Starting;
            if entries.get(id).filter(waits).is_none() {
                return;
            }
        }
    }

    async fn is_ready(&self, id: &InstanceId, run: u32, status: String) {
        if let Some(entry) = lock(&self.entries).get_mut(id) {
            if entry.seen != (Seen { run, phase: Phase::Starting }) {
                return;
            }
            entry.seen.phase = Phase::Ready;
            entry.status = status;
        }
        self.tell(id);
        // For whoever looks after it next; it can be found out again.
        if let Err(error) = self.note(id, READY, run).await {
            tracing::debug!(instance.id = %id, "noting that instance {id} is ready: {error}");
        }
    }

    fn tell(&self, id: &InstanceId) {
        // Nobody listening is fine.
        let _ = self.changes.send(id.clone());
    }

    /// Numbers a look before it begins. Answers may overtake each other; every change is followed by a look that began
    /// after it, so what an older look brings can be dropped.
    pub(super) fn begin_look(&self) -> u64 {
        self.looks.fetch_add(1, Ordering::Relaxed)
    }

    /// Is there no more, as this look saw.
    pub(super) fn gone(&self, id: &InstanceId, look: u64) {
        {
            let mut entries = lock(&self.entries);
            if entries.get(id).is_some_and(|entry| entry.look > look) {
                return;
            }
            let mut removed = lock(&self.removed);
            removed.insert(id.clone(), look);
            if removed.len() > MOST_REMOVED {
                removed.retain(|_, since| *since + MOST_REMOVED as u64 / 2 > look);
            }
            if entries.remove(id).is_none() {
                return;
            }
        }
        self.tell(id);
    }

    /// Looks at one container.
    pub(super) async fn look(&self, id: &InstanceId) {
        let look = self.begin_look();
        match self.lxd.instance(&name(id)).await {
            Ok((instance, _)) => self.learn(id, &instance, look).await,
            Err(error) if error.is_not_found() => self.gone(id, look),
            // What is known stays; a connection that comes back brings everything.
            Err(error) => tracing::debug!(instance.id = %id, "looking at instance {id}: {error}"),
        }
    }

    /// Looks at all containers.
    pub(super) async fn look_at_all(&self) -> Result<(), LxdError> {
        let before: BTreeSet<InstanceId> = lock(&self.entries).keys().cloned().collect();
        let look = self.begin_look();
        let mut there = BTreeSet::new();
        let mut ours = Vec::new();
        for instance in self.lxd.all_instances().await? {
            let Some(id) = id_of(&instance.name) else { continue };
            // Of a container whose member does not answer only the name is told.
            if instance.config.contains_key(OURS) || instance.status == "Error" {
                there.insert(id.clone());
                ours.push((id, instance));
            }
        }
        for id in before.difference(&there) {
            self.gone(id, look);
        }
        let learn = async |(id, instance): (InstanceId, Instance)| self.learn(&id, &instance, look).await;
        stream::iter(ours).for_each_concurrent(AT_ONCE, learn).await;
        Ok(())
    }

    async fn learn(&self, id: &InstanceId, instance: &Instance, look: u64) {
        let keys = Keys::of(instance);
        let known = lock(&self.entries).get(id).map(|entry| entry.seen.clone());
        let seen = match instance.status.as_str() {
            "Error" if !instance.config.contains_key(OURS) => match self.of_lost(&instance.location, known) {
                Some(seen) => seen,
                None => return,
            },
            "Stopped" => match known {
                // Nothing more will be said of it.
                Some(known) if known.run == keys.run && matches!(known.phase, Phase::Ended(_)) => known,
                // It has not begun and may be just about to: LXD would first wait until nobody reads its files.
                _ if keys.started != keys.run || instance.config.contains_key(BASE) => keys.at_rest(None),
                _ => match self.last_words(id, keys.run).await {
                    Ok(state) => keys.at_rest(state),
                    Err(error) => {
                        tracing::debug!(instance.id = %id, "reading the last state of instance {id}: {error}");
                        return;
                    }
                },
            },
            _ => match known {
                // Known to be ready before it stands in its keys.
                Some(known) if known.run == keys.run && known.phase == Phase::Ready => {
                    let phase = if keys.stopped == keys.run { Phase::Stopping } else { Phase::Ready };
                    Seen { run: keys.run, phase }
                }
                _ => Seen { run: keys.run, phase: keys.live() },
            },
        };
        let address = instance.devices.get("eth0").and_then(|nic| nic.get("ipv4.address")?.parse().ok());
        let changed = {
            let mut entries = lock(&self.entries);
            let is_old = entries.get(id).is_some_and(|entry| entry.look > look)
                || lock(&self.removed).get(id).is_some_and(|removed| *removed > look);
            if is_old {
                return;
            }
            let entry = entries.entry(id.clone()).or_insert_with(|| Entry {
                node: String::new(),
                address: None,
                seen: Seen::ABSENT,
                status: String::new(),
                ending: None,
                look,
                notes: Arc::default(),
                base: false,
                following: false,
            });
            if !instance.config.is_empty() {
                entry.address = address;
                entry.base = instance.config.contains_key(BASE);
            }
            entry.node.clone_from(&instance.location);
            if !seen.phase.is_live() {
                entry.status.clear();
            }
            entry.look = look;
            let changed = entry.seen != seen;
            entry.seen = seen;
            changed
        };
        if changed {
            self.tell(id);
        }
    }

    /// Of a container whose member does not answer; none: wait and see.
    fn of_lost(&self, node: &str, known: Option<Seen>) -> Option<Seen> {
        let lost = lock(&self.members).get(node).and_then(|member| member.lost);
        let given_up = lost.is_some_and(|since| since.elapsed() >= LOST);
        let message = format!("its node {node} is lost: it does not answer");
        let ended = Phase::Ended(Ended { reason: EndReason::Failed, message });
        match known {
            Some(known) if given_up && known.phase.is_live() => Some(Seen { run: known.run, phase: ended }),
            Some(_) => None,
            // Nothing is known of its runs, so it counts as the newest.
            None => Some(Seen { run: u32::MAX, phase: ended }),
        }
    }

    async fn last_words(&self, id: &InstanceId, run: u32) -> Result<Option<GuestState>, LxdError> {
        if run == 0 {
            return Ok(None);
        }
        match self.lxd.read_file(&name(id), &format!("{GUEST_DIR}/{STATE_FILE}")).await {
            // Written by an instance, which may have written anything.
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(LxdError::Unreachable { call, source }) => Err(LxdError::Unreachable { call, source }),
            Err(error) => {
                tracing::debug!(instance.id = %id, "instance {id} left no state: {error}");
                Ok(None)
            }
        }
    }

    pub(super) fn learn_members(&self, members: &[ClusterMember]) {
        let mut known = lock(&self.members);
        known.retain(|name, _| members.iter().any(|member| member.server_name == *name));
        for member in members {
            let entry = known
                .entry(member.server_name.clone())
                .or_insert_with(|| Member { address: network::host(&member.url), lost: None });
            entry.address = network::host(&member.url);
            entry.lost = match member.status.as_str() {
                "Offline" => entry.lost.or_else(|| Some(Instant::now())),
                _ => None,
            };
        }
    }

    fn any_lost(&self) -> bool {
        lock(&self.members).values().any(|member| member.lost.is_some())
    }

    /// Follows what happens, for as long as the engine is there.
    pub(super) fn follow(self: &Arc<Self>, events: Events) {
        let told = tokio::spawn(follow_events(Arc::downgrade(self), events));
        let mut tasks = lock(&self.tasks);
        tasks.push(told.abort_handle());
        tasks.push(tokio::spawn(follow_members(Arc::downgrade(self))).abort_handle());
    }
}

async fn follow_events(inner: Weak<Inner>, mut events: Events) {
    loop {
        let signal = events.next().await;
        let Some(inner) = inner.upgrade() else { return };
        match signal {
            Signal::Connected => {
                if let Err(error) = inner.look_at_all().await {
                    tracing::warn!("listing the containers of LXD: {error}");
                }
            }
            Signal::Event(event) => {
                let Some(id) = event.lifecycle().and_then(|lifecycle| id_of(lifecycle.instance()?)) else {
                    continue;
                };
                tokio::spawn(async move { inner.look(&id).await });
            }
            Signal::Disconnected(error) => {
                tracing::warn!("events of LXD are lost: {}", fanlight_service::telemetry::chain(&error));
            }
        }
    }
}

/// Nothing tells that a member is lost, so they are looked at.
async fn follow_members(inner: Weak<Inner>) {
    let mut lost_before = false;
    loop {
        tokio::time::sleep(MEMBERS).await;
        let Some(inner) = inner.upgrade() else { return };
        if !inner.is_clustered() {
            // One server may have become a cluster.
            if let Ok(server) = inner.root.server().await
                && server.environment.server_clustered
            {
                inner.clustered.store(true, Ordering::Relaxed);
            }
            continue;
        }
        match inner.root.members().await {
            Ok(members) => inner.learn_members(&members),
            Err(error) => {
                tracing::debug!("looking at the members of LXD: {error}");
                continue;
            }
        }
        let lost = inner.any_lost();
        if (lost || lost_before)
            && let Err(error) = inner.look_at_all().await
        {
            tracing::debug!("listing the containers of LXD: {error}");
        }
        lost_before = lost;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(run: u32, phase: GuestPhase) -> Option<GuestState> {
        Some(GuestState { version: 1, run, phase, status: String::new() })
    }

    #[test]
    fn a_container_that_runs_is_as_far_as_its_keys_say() {
        let keys = |run, ready, stopped| Keys { run, started: run, ready, stopped };
        for (keys, phase) in [
            (keys(0, 0, 0), Phase::Idle),
            (keys(2, 1, 1), Phase::Starting),
            (keys(2, 2, 1), Phase::Ready),
            (keys(2, 2, 2), Phase::Stopping),
            (keys(2, 1, 2), Phase::Stopping),
        ] {
            assert_eq!(keys.live(), phase, "{keys:?}");
        }
    }

    #[test]
    fn the_end_of_a_run_is_told_from_its_last_words_and_what_was_asked() {
        let idle = Ended { reason: EndReason::Idle, message: "nobody came".into() };
        let reason = |seen: Seen| match seen.phase {
            Phase::Ended(ended) => Some((seen.run, ended.reason)),
            _ => None,
        };
        let keys = Keys { run: 2, started: 2, ready: 2, stopped: 1 };
        assert_eq!(
            reason(keys.at_rest(state(2, GuestPhase::Ended(idle.clone())))),
            Some((2, EndReason::Idle))
        );
        // Words of an older run say nothing.
        assert_eq!(
            reason(keys.at_rest(state(1, GuestPhase::Ended(idle.clone())))),
            Some((2, EndReason::Failed))
        );
        assert_eq!(reason(keys.at_rest(state(2, GuestPhase::Ready))), Some((2, EndReason::Failed)));
        assert_eq!(reason(keys.at_rest(None)), Some((2, EndReason::Failed)));
        let asked = Keys { stopped: 2, ..keys };
        assert_eq!(reason(asked.at_rest(state(2, GuestPhase::Ready))), Some((2, EndReason::Stopped)));
        // A run that was asked for and never begun can begin.
        let never = Keys { run: 2, started: 1, ready: 1, stopped: 1 };
        assert_eq!(never.at_rest(state(1, GuestPhase::Ended(idle))), Seen { run: 1, phase: Phase::Idle });
        assert_eq!(Keys::default().at_rest(None), Seen { run: 0, phase: Phase::Idle });
    }

    #[test]
    fn only_containers_with_our_names_are_ours() {
        assert_eq!(id_of("ams-abc").as_ref().map(InstanceId::as_str), Some("abc"));
        assert_eq!(id_of("web"), None);
        assert_eq!(id_of("ams-"), None);
    }
}
