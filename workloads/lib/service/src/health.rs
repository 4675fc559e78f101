//! Ready is a latch held by whoever is not: a program is ready when nobody holds it any more.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::watch;

/// The latch. Clones are handles of the same.
#[derive(Clone, Debug)]
pub struct Ready {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    holds: Mutex<BTreeMap<u64, &'static str>>,
    open: watch::Sender<bool>,
}

/// Keeps a program from being ready while it lives.
#[derive(Debug)]
pub struct Hold {
    inner: Arc<Inner>,
    number: u64,
}

impl Default for Ready {
    fn default() -> Self {
        Self::new()
    }
}

impl Ready {
    /// A latch nobody holds.
    pub fn new() -> Self {
        let (open, _) = watch::channel(true);
        Self { inner: Arc::new(Inner { holds: Mutex::new(BTreeMap::new()), open }) }
    }

    /// Holds the latch until the result is dropped. `name` says in words what is waited for.
    pub fn hold(&self, name: &'static str) -> Hold {
        let mut holds = self.inner.holds.lock().unwrap_or_else(PoisonError::into_inner);
        let number = holds.last_key_value().map_or(0, |(last, _)| last + 1);
        holds.insert(number, name);
        self.inner.open.send_replace(false);
        Hold { inner: self.inner.clone(), number }
    }

    /// Whether nobody holds it.
    pub fn is_ready(&self) -> bool {
        *self.inner.open.borrow()
    }

    /// What is waited for.
    pub fn waiting_for(&self) -> Vec<&'static str> {
        self.inner.holds.lock().unwrap_or_else(PoisonError::into_inner).values().copied().collect()
    }

    /// Resolves once nobody holds it.
    pub async fn wait(&self) {
        // The sender lives as long as `self`.
        let _ = self.inner.open.subscribe().wait_for(|open| *open).await;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut holds = self.inner.holds.lock().unwrap_or_else(PoisonError::into_inner);
        holds.remove(&self.number);
        self.inner.open.send_replace(holds.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_comes_when_the_last_hold_is_gone() {
        let ready = Ready::new();
        assert!(ready.is_ready());
        let (store, bus) = (ready.hold("store"), ready.hold("bus"));
        assert_eq!(ready.waiting_for(), ["store", "bus"]);
        drop(store);
        assert!(!ready.is_ready());
        let waiting = tokio::spawn({
            let ready = ready.clone();
            async move { ready.wait().await }
        });
        drop(bus);
        waiting.await.expect("woken");
        assert!(ready.is_ready());
    }
}
