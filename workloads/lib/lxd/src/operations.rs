//! Work in the background.

use std::time::Duration;

use http::Method;
use serde::Deserialize;
use serde_json::Value;

use crate::{
    Lxd, LxdError,
    call::{CALL_TIMEOUT, Call, part},
};

/// Begun work. Dropping it changes nothing.
#[derive(Debug)]
pub struct Operation {
    pub(crate) lxd: Lxd,
    pub(crate) call: String,
    /// Its id.
    pub id: String,
    /// The operation as it was when it began.
    pub(crate) metadata: Value,
}

/// Work as LXD describes it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Outcome {
    /// Its id.
    pub id: String,
    /// `Success`, `Failure`, `Cancelled`, `Running`.
    pub status: String,
    /// 200 when done, 400 when failed, 401 when cancelled, others while it goes on.
    pub status_code: u16,
    /// What it is about, by kind.
    pub resources: Option<std::collections::HashMap<String, Vec<String>>>,
    /// What it gave.
    pub metadata: Option<Value>,
    /// Why it failed.
    pub err: String,
}

impl Operation {
    /// Waits until it has ended.
    ///
    /// # Errors
    /// It failed, was cancelled, or goes on after this time.
    pub async fn wait(&self, timeout: Duration) -> Result<Outcome, LxdError> {
        let path = format!("/1.0/operations/{}/wait", part(&self.id));
        // LXD counts whole seconds; the answer itself needs some time too.
        let seconds = timeout.as_secs().max(1);
        let call = Call::new(Method::GET, &path)
            .query("timeout", seconds)
            .timeout(Duration::from_secs(seconds) + CALL_TIMEOUT);
        let outcome: Outcome = self.lxd.tagged(call).await?.0;
        match outcome.status_code {
            200 => Ok(outcome),
            400 | 401 => Err(LxdError::failed(
                self.call.clone(),
                if outcome.err.is_empty() { outcome.status } else { outcome.err },
            )),
            _ => Err(LxdError::TimedOut { call: self.call.clone(), timeout }),
        }
    }

    /// Asks LXD to give it up.
    ///
    /// # Errors
    /// It has ended, or cannot be cancelled.
    pub async fn cancel(&self) -> Result<(), LxdError> {
        let path = format!("/1.0/operations/{}", part(&self.id));
        self.lxd.done(Call::new(Method::DELETE, &path)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_operation_is_read() {
        let text = r#"{"id":"57e0","class":"task","description":"Starting instance","status":"Failure",
            "status_code":400,"resources":{"instances":["/1.0/instances/c1"]},"metadata":null,
            "may_cancel":false,"err":"Failed to run","location":"none"}"#;
        let outcome: Outcome = serde_json::from_str(text).expect("as LXD writes it");
        assert_eq!((outcome.status_code, outcome.err.as_str()), (400, "Failed to run"));
        assert!(outcome.metadata.is_none());
    }
}
