//! The bus inside one process: a table of subscribers, each with a bounded queue.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};

use crate::{MAX_PAYLOAD_BYTES, QUEUE_BYTES, QUEUE_MESSAGES, RequestError, loss::Loss, subject};

/// The table.
pub struct Local {
    table: Mutex<Table>,
    next_id: AtomicU64,
    next_turn: AtomicUsize,
    loss: Loss,
    connected: watch::Sender<bool>,
}

#[derive(Default)]
struct Table {
    /// Subscribers by exact subject, so that a message of one session costs the same however many there are.
    exact: HashMap<Arc<str>, Vec<Subscriber>>,
    wild: Vec<Subscriber>,
}

#[derive(Clone)]
struct Subscriber {
    id: u64,
    filter: Arc<str>,
    group: Option<Arc<str>>,
    queue: mpsc::Sender<Delivery>,
    bytes: Arc<AtomicUsize>,
}

/// A message in a queue.
#[derive(Clone)]
pub struct Delivery {
    pub subject: Arc<str>,
    pub reply: Option<Arc<str>>,
    pub payload: Bytes,
}

/// The receiving end of a subscription.
pub struct Receiver {
    id: u64,
    filter: Arc<str>,
    queue: mpsc::Receiver<Delivery>,
    bytes: Arc<AtomicUsize>,
    // Weak, so that subscriptions do not keep a bus alive that nobody can publish on.
    bus: Weak<Local>,
}

impl Default for Local {
    fn default() -> Self {
        Self {
            table: Mutex::default(),
            next_id: AtomicU64::new(1),
            next_turn: AtomicUsize::new(0),
            loss: Loss::default(),
            connected: watch::Sender::new(true),
        }
    }
}

impl Local {
    fn table(&self) -> MutexGuard<'_, Table> {
        // The table is whole between any two statements that could panic.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn connected(&self) -> watch::Receiver<bool> {
        self.connected.subscribe()
    }

    pub fn lost(&self) -> u64 {
        self.loss.total()
    }

    pub fn subscribe(self: &Arc<Self>, filter: &str, group: Option<&str>) -> Receiver {
        let (sender, queue) = mpsc::channel(QUEUE_MESSAGES);
        let filter: Arc<str> = filter.into();
        let subscriber = Subscriber {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            filter: filter.clone(),
            group: group.map(Into::into),
            queue: sender,
            bytes: Arc::default(),
        };
        let receiver = Receiver {
            id: subscriber.id,
            filter: filter.clone(),
            queue,
            bytes: subscriber.bytes.clone(),
            bus: Arc::downgrade(self),
        };
        let mut table = self.table();
        if subject::is_wild(&filter) {
            table.wild.push(subscriber);
        } else {
            table.exact.entry(filter).or_default().push(subscriber);
        }
        receiver
    }

    fn unsubscribe(&self, filter: &Arc<str>, id: u64) {
        let mut table = self.table();
        if subject::is_wild(filter) {
            table.wild.retain(|subscriber| subscriber.id != id);
        } else if let Some(subscribers) = table.exact.get_mut(filter) {
            subscribers.retain(|subscriber| subscriber.id != id);
            if subscribers.is_empty() {
                table.exact.remove(filter);
            }
        }
    }

    /// Subscribers of a subject: those without a group, and the members of each group.
    fn find(&self, subject: &str) -> (Vec<Subscriber>, HashMap<Arc<str>, Vec<Subscriber>>) {
        let table = self.table();
        let exact = table.exact.get(subject).into_iter().flatten();
        let wild = table.wild.iter().filter(|subscriber| subject::matches(&subscriber.filter, subject));
        let mut single = Vec::new();
        let mut groups: HashMap<Arc<str>, Vec<Subscriber>> = HashMap::new();
        for subscriber in exact.chain(wild) {
            match &subscriber.group {
                None => single.push(subscriber.clone()),
                Some(group) => groups.entry(group.clone()).or_default().push(subscriber.clone()),
            }
        }
        (single, groups)
    }

    pub fn publish(&self, subject: &str, reply: Option<&str>, payload: Bytes) {
        self.deliver(subject, reply, payload);
    }

    /// Returns whether anybody subscribes to the subject.
    fn deliver(&self, subject: &str, reply: Option<&str>, payload: Bytes) -> bool {
        if !subject::is_valid(subject) {
            self.loss.count(subject, "its subject is invalid");
            return false;
        }
        if payload.len() > MAX_PAYLOAD_BYTES {
            self.loss.count(subject, "it is larger than 1 MiB");
            return true;
        }
        let (single, groups) = self.find(subject);
        if single.is_empty() && groups.is_empty() {
            return false;
        }
        let delivery = Delivery { subject: subject.into(), reply: reply.map(Into::into), payload };
        for subscriber in single {
            if !subscriber.offer(&delivery) {
                self.loss.count(subject, "a subscriber does not keep up");
            }
        }
        for (_, members) in groups {
            // Members take turns; one that is full is passed over.
            let turn = self.next_turn.fetch_add(1, Ordering::Relaxed);
            let mut order = members.iter().cycle().skip(turn % members.len()).take(members.len());
            if !order.any(|member| member.offer(&delivery)) {
                self.loss.count(subject, "no subscriber of the group keeps up");
            }
        }
        true
    }

    pub async fn request(
        self: &Arc<Self>,
        subject: &str,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, RequestError> {
        let inbox = format!("_INBOX.{}", self.next_id.fetch_add(1, Ordering::Relaxed));
        let mut answers = self.subscribe(&inbox, None);
        if !self.deliver(subject, Some(&inbox), payload) {
            return Err(RequestError::NoResponders(subject.into()));
        }
        let answer = tokio::time::timeout(timeout, std::future::poll_fn(|cx| answers.poll_recv(cx))).await;
        match answer {
            Ok(Some(delivery)) => Ok(delivery.payload),
            Ok(None) | Err(_) => Err(RequestError::TimedOut { subject: subject.into(), timeout }),
        }
    }
}

impl Subscriber {
    fn offer(&self, delivery: &Delivery) -> bool {
        let size = delivery.payload.len();
        if self.bytes.fetch_add(size, Ordering::AcqRel) + size > QUEUE_BYTES
            || self.queue.try_send(delivery.clone()).is_err()
        {
            self.bytes.fetch_sub(size, Ordering::AcqRel);
            return false;
        }
        true
    }
}

impl Receiver {
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<Delivery>> {
        self.queue.poll_recv(cx).map(|delivery| {
            if let Some(delivery) = &delivery {
                self.bytes.fetch_sub(delivery.payload.len(), Ordering::AcqRel);
            }
            delivery
        })
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Some(bus) = self.bus.upgrade() {
            bus.unsubscribe(&self.filter, self.id);
        }
    }
}
