//! A browser that streams for a while and says what it decoded, and by which way it came.

use std::{path::PathBuf, process::Stdio, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, process::Command};

/// How long a stream is watched, and what a person would not take for a stream any more.
const WATCH_S: u64 = 20;
const LONGEST_PAUSE_MS: f64 = 5_000.0;
/// A browser needs longer than its watching to start and to connect on a busy machine.
const BROWSER: Duration = Duration::from_secs(240);

/// The browser's side. Where two checkouts share their builds it is that of the one whose tests run.
fn script() -> PathBuf {
    let built = || env!("CARGO_MANIFEST_DIR").into();
    PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(built)).join("../raw/network.mjs")
}

/// Streams in the network that this thread is in; what was seen while frames went on without a long pause. `url` and
/// `servers` are those of the gateway's answer.
///
/// # Errors
/// The browser does not start or connect, the picture is blank, or it stands still.
pub async fn watch(url: &str, servers: &Value) -> Result<Value> {
    let wanted = json!({ "url": url, "stun_servers": servers, "seconds": WATCH_S }).to_string();
    let mut node = Command::new("node")
        .arg(script())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("starting node")?;
    let mut input = node.stdin.take().context("node has no input")?;
    input.write_all(wanted.as_bytes()).await?;
    drop(input);
    let ended = tokio::time::timeout(BROWSER, node.wait_with_output());
    let output = ended.await.context("the browser does not come to an end")??;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "the browser: {}", String::from_utf8_lossy(&output.stderr));
    let seen: Value = serde_json::from_str(&said).with_context(|| format!("reading {said:?}"))?;
    println!("the browser saw {seen}");
    ensure!(seen["errors"] == json!([]), "errors: {}", seen["errors"]);
    ensure!(seen["pictured"] == true, "the picture is blank");
    ensure!(during(&seen, "framesDecoded") >= 100.0, "hardly any frames");
    let pause = seen["longest_pause_ms"].as_f64().context("no pause is told")?;
    ensure!(pause < LONGEST_PAUSE_MS, "the picture stood still for {pause} ms");
    Ok(seen)
}

/// How far a number came while the browser watched.
pub fn during(seen: &Value, name: &str) -> f64 {
    let at = |when: &str| seen[when][name].as_f64().unwrap_or_default();
    at("last") - at("first")
}
