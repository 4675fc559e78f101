//! All session records in memory, as the store has them: folded from a watch, and from this unit's own writes at
//! once. Whoever needs to know what becomes of one session follows it here.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use fanlight_api::{AgentId, SessionId, gateway::SessionStatus};
use fanlight_store::{Event, Revision, decode};
use tokio::sync::watch;

use crate::session::Session;

/// Prefix of session records in the store.
pub const SESSIONS: &str = "gateway/sessions/";

/// Key of a session's record.
pub fn key(id: &SessionId) -> String {
    format!("{SESSIONS}{id}")
}

/// The sessions in memory.
#[derive(Default)]
pub struct Index {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    sessions: HashMap<SessionId, (Arc<Session>, Revision)>,
    /// Those that a reconciler has to look after: created or terminating.
    pending: HashSet<SessionId>,
    /// Those of each agent.
    of_agents: HashMap<AgentId, HashSet<SessionId>>,
    followers: HashMap<SessionId, watch::Sender<Option<Arc<Session>>>>,
    /// Followers that were left when those that nobody listens to were last taken out.
    followed: usize,
}

impl Index {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a record as written at a revision; an older one than known is ignored.
    pub fn put(&self, session: Session, revision: Revision) -> Arc<Session> {
        self.lock().put(session, revision)
    }

    /// Takes note that a record is gone.
    pub fn remove(&self, id: &SessionId) {
        self.lock().remove(id);
    }

    /// Folds an event of the store's watch.
    pub fn fold(&self, event: Event) {
        let mut inner = self.lock();
        match event {
            Event::Reset { entries, .. } => {
                let mut gone: HashSet<SessionId> = inner.sessions.keys().cloned().collect();
                for entry in entries {
                    if let Some(session) = read(&entry.key, &entry.value) {
                        gone.remove(&session.id);
                        inner.put(session, entry.revision);
                    }
                }
                for id in gone {
                    inner.remove(&id);
                }
            }
            Event::Put(entry) => {
                // Most news is of what this unit wrote itself: known, and not worth reading.
                if inner.knows(&entry.key, entry.revision) {
                    return;
                }
                if let Some(session) = read(&entry.key, &entry.value) {
                    inner.put(session, entry.revision);
                }
            }
            Event::Delete { key, .. } => {
                if let Some(Ok(id)) = key.strip_prefix(SESSIONS).map(str::parse) {
                    inner.remove(&id);
                }
            }
        }
    }

    /// A session.
    pub fn get(&self, id: &SessionId) -> Option<Arc<Session>> {
        self.lock().sessions.get(id).map(|(session, _)| session.clone())
    }

    /// A session and the revision at which it was written.
    pub fn record(&self, id: &SessionId) -> Option<(Arc<Session>, Revision)> {
        self.lock().sessions.get(id).cloned()
    }

    /// All sessions, in no order.
    pub fn all(&self) -> Vec<Arc<Session>> {
        self.lock().sessions.values().map(|(session, _)| session.clone()).collect()
    }

    /// Those that wait for something.
    pub fn pending(&self) -> Vec<Arc<Session>> {
        let inner = self.lock();
        inner.pending.iter().filter_map(|id| Some(inner.sessions.get(id)?.0.clone())).collect()
    }

    /// The sessions of an agent in a cluster.
    pub fn of_agent(&self, agent_id: &AgentId, cluster_id: &str) -> Vec<SessionId> {
        let inner = self.lock();
        let of_cluster = |id: &&SessionId| {
            inner.sessions.get(*id).is_some_and(|(session, _)| session.cluster_id == cluster_id)
        };
        inner.of_agents.get(agent_id).into_iter().flatten().filter(of_cluster).cloned().collect()
    }

    /// A session and its changes; `None` when it is gone.
    pub fn follow(&self, id: &SessionId) -> watch::Receiver<Option<Arc<Session>>> {
        let mut inner = self.lock();
        let current = inner.sessions.get(id).map(|(session, _)| session.clone());
        // A walk over all of them, but only once they have doubled.
        if inner.followers.len() > 2 * inner.followed + 1024 {
            inner.followers.retain(|_, follower| follower.receiver_count() > 0);
            inner.followed = inner.followers.len();
        }
        inner.followers.entry(id.clone()).or_insert_with(|| watch::Sender::new(current)).subscribe()
    }
}

impl Inner {
    fn knows(&self, key: &str, revision: Revision) -> bool {
        let id = key.strip_prefix(SESSIONS).and_then(|id| id.parse().ok());
        id.and_then(|id: SessionId| self.sessions.get(&id)).is_some_and(|(_, at)| *at >= revision)
    }

    fn put(&mut self, session: Session, revision: Revision) -> Arc<Session> {
        if let Some((known, at)) = self.sessions.get(&session.id)
            && *at >= revision
        {
            return known.clone();
        }
        let session = Arc::new(session);
        let moved = match self.sessions.get(&session.id) {
            Some((known, _)) if known.agent_id == session.agent_id => false,
            Some((known, _)) => {
                let from = known.agent_id.clone();
                self.leave(&from, &session.id);
                true
            }
            None => true,
        };
        if moved {
            self.of_agents.entry(session.agent_id.clone()).or_default().insert(session.id.clone());
        }
        if matches!(session.status, SessionStatus::Created | SessionStatus::Terminating) {
            self.pending.insert(session.id.clone());
        } else {
            self.pending.remove(&session.id);
        }
        self.sessions.insert(session.id.clone(), (session.clone(), revision));
        self.tell(&session.id, Some(session.clone()));
        session
    }

    fn remove(&mut self, id: &SessionId) {
        if let Some((known, _)) = self.sessions.remove(id) {
            self.leave(&known.agent_id, id);
        }
        self.pending.remove(id);
        self.tell(id, None);
    }

    fn leave(&mut self, agent_id: &AgentId, id: &SessionId) {
        if let Some(sessions) = self.of_agents.get_mut(agent_id) {
            sessions.remove(id);
            if sessions.is_empty() {
                self.of_agents.remove(agent_id);
            }
        }
    }

    fn tell(&mut self, id: &SessionId, session: Option<Arc<Session>>) {
        if let Some(follower) = self.followers.get(id) {
            if follower.receiver_count() == 0 {
                self.followers.remove(id);
            } else {
                follower.send_replace(session);
            }
        }
    }
}

fn read(key: &str, value: &[u8]) -> Option<Session> {
    match decode(key, value) {
        Ok(session) => Some(session),
        Err(error) => {
            tracing::error!("session record {key} cannot be read and is left alone: {error}");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::tests::session;

    #[tokio::test]
    async fn followers_see_changes_and_the_end_and_older_news_are_ignored() {
        let index = Index::default();
        let id = session().id;
        let mut follower = index.follow(&id);
        assert!(follower.borrow().is_none());
        index.put(session(), 5);
        assert_eq!(index.pending().len(), 1);
        follower.changed().await.expect("told");
        index.put(Session { status: SessionStatus::Active, ..session() }, 6);
        index.put(session(), 5);
        assert_eq!(index.get(&id).expect("there").status, SessionStatus::Active);
        assert!(index.pending().is_empty());
        let (first, second): (AgentId, AgentId) = (session().agent_id, "a2".parse().expect("id"));
        assert_eq!(index.of_agent(&first, &session().cluster_id), [session().id]);
        index.put(Session { agent_id: second.clone(), ..session() }, 7);
        assert!(index.of_agent(&first, &session().cluster_id).is_empty());
        assert_eq!(index.of_agent(&second, &session().cluster_id), [session().id]);
        assert!(index.of_agent(&second, "elsewhere").is_empty());
        index.fold(Event::Reset { entries: vec![], revision: 8 });
        follower.changed().await.expect("told");
        assert!(follower.borrow().is_none());
        assert!(index.all().is_empty() && index.of_agent(&second, &session().cluster_id).is_empty());
    }
}
