//! `fanlight benchmark`: how long instances take, as they are launched one after the other or side by side.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use fanlight_api::{
    SessionId,
    ams::{InstanceConfig, InstancesPost},
    gateway::SessionsPost,
};
use fanlight_client::{AmsClient, GatewayClient};
use futures_util::{StreamExt as _, stream};
use serde::Serialize;

use super::{
    cli::{Benchmark, Format},
    output,
    progress::Line,
    remotes::{client, local_stack},
    viewer,
};
use crate::commands;

/// How long an instance may take to go away again.
const CLEARING: Duration = Duration::from_secs(120);

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    application: String,
    streamed: bool,
    count: u32,
    parallel: u32,
    failed: usize,
    /// From the first launch until the last was done.
    seconds: f64,
    launches_per_minute: f64,
    /// From the launch until the instance was running.
    #[serde(skip_serializing_if = "Option::is_none")]
    running_ms: Option<Spread>,
    /// From the creation of the session until its first picture had come as a whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    first_frame_ms: Option<Spread>,
    /// Different texts of failures.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<String>,
}

/// Times in milliseconds; percentiles are values that were measured (nearest rank).
#[derive(Debug, PartialEq, Serialize)]
struct Spread {
    min: f64,
    p50: f64,
    p90: f64,
    p95: f64,
    p99: f64,
    max: f64,
    mean: f64,
}

impl Spread {
    fn of(times: &[Duration]) -> Option<Self> {
        let mut sorted: Vec<f64> = times.iter().map(|time| round(time.as_secs_f64() * 1e3)).collect();
        sorted.sort_by(f64::total_cmp);
        let at = |percent: f64| {
            sorted[((percent / 100.0 * sorted.len() as f64).ceil() as usize).clamp(1, sorted.len()) - 1]
        };
        if sorted.is_empty() {
            return None;
        }
        Some(Self {
            min: at(0.0),
            p50: at(50.0),
            p90: at(90.0),
            p95: at(95.0),
            p99: at(99.0),
            max: at(100.0),
            mean: round(sorted.iter().sum::<f64>() / sorted.len() as f64),
        })
    }
}

/// To a tenth.
fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// One launch that went well.
#[derive(Clone, Copy, Debug, Default)]
struct Launched {
    running: Option<Duration>,
    picture: Option<Duration>,
}

/// `fanlight benchmark`
///
/// # Errors
/// Nothing could be launched, or some launches failed; the report is printed before.
pub async fn benchmark(options: Benchmark) -> Result<()> {
    if let Some(rate) = options.rate.filter(|rate| !rate.is_finite() || *rate <= 0.0) {
        return Err(super::failure::Usage(format!("--rate is {rate}; expected a number above 0")).into());
    }
    let ams = client(&options.target)?;
    let gateway =
        if options.streamed { Some(commands::gateway(&local_stack(&options.target)?)?) } else { None };
    // Looked for before, so that a wrong name is one failure and not as many as launches.
    ams.application(&options.application).await.context("finding the application")?;
    let begun = Instant::now();
    let mut line = Line::new();
    let mut results = Vec::new();
    let mut launches = stream::iter(0..options.count)
        .map(|number| one(&ams, gateway.as_ref(), &options, begun, number))
        .buffer_unordered(options.parallel as usize);
    while let Some(result) = launches.next().await {
        results.push(result);
        line.say(&format!("{} of {} launched", results.len(), options.count));
    }
    drop(line);
    let elapsed = begun.elapsed();
    let report = report(&options, &results, elapsed);
    output::document(Format::Json, &report)?;
    if report.failed > 0 {
        bail!("{} of {} launches failed", report.failed, options.count);
    }
    Ok(())
}

fn report(options: &Benchmark, results: &[Result<Launched>], elapsed: Duration) -> Report {
    let launched: Vec<Launched> = results.iter().filter_map(|result| result.as_ref().ok().copied()).collect();
    let times =
        |which: fn(&Launched) -> Option<Duration>| launched.iter().filter_map(which).collect::<Vec<_>>();
    let mut errors: Vec<String> =
        results.iter().filter_map(|result| result.as_ref().err()).map(|error| format!("{error:#}")).collect();
    let failed = errors.len();
    errors.sort();
    errors.dedup();
    Report {
        application: options.application.clone(),
        streamed: options.streamed,
        count: options.count,
        parallel: options.parallel,
        failed,
        seconds: round(elapsed.as_secs_f64()),
        launches_per_minute: round(launched.len() as f64 * 60.0 / elapsed.as_secs_f64().max(1e-3)),
        running_ms: Spread::of(&times(|launched| launched.running)),
        first_frame_ms: Spread::of(&times(|launched| launched.picture)),
        errors,
    }
}

async fn one(
    ams: &AmsClient,
    gateway: Option<&GatewayClient>,
    options: &Benchmark,
    begun: Instant,
    number: u32,
) -> Result<Launched> {
    if let Some(rate) = options.rate {
        tokio::time::sleep_until((begun + Duration::from_secs_f64(f64::from(number) / rate)).into()).await;
    }
    match gateway {
        Some(gateway) => streamed(ams, gateway, options).await,
        None => plain(ams, options).await,
    }
}

async fn plain(ams: &AmsClient, options: &Benchmark) -> Result<Launched> {
    let request = InstancesPost {
        app_id: options.application.clone(),
        node: options.node.clone().unwrap_or_default(),
        config: InstanceConfig::default(),
        ..InstancesPost::default()
    };
    let start = Instant::now();
    let operation = ams.launch(&request, false, None).await.context("launching")?;
    let launched = ams.wait(&operation, options.timeout).await.context("waiting until the instance runs");
    let running = start.elapsed();
    if !options.keep
        && let Some(id) = operation.resource("instances")
    {
        clear(ams, id).await?;
    }
    launched?;
    Ok(Launched { running: Some(running), picture: None })
}

async fn clear(ams: &AmsClient, id: &str) -> Result<()> {
    let deleted = ams.delete_instance(id, true).await.with_context(|| format!("deleting {id}"))?;
    ams.wait(&deleted, CLEARING).await.with_context(|| format!("deleting {id}"))?;
    Ok(())
}

async fn streamed(ams: &AmsClient, gateway: &GatewayClient, options: &Benchmark) -> Result<Launched> {
    let request = SessionsPost { app: Some(options.application.clone()), ..SessionsPost::default() };
    let start = Instant::now();
    let session = gateway.create_session(&request).await.context("creating the session")?;
    let picture = async {
        let socket = gateway.signalling(&session.url).await.context("joining the session")?;
        viewer::first_picture(socket, options.timeout).await
    };
    let (picture, running) = tokio::join!(picture, running(ams, &session.id, start, options.timeout));
    let deleted = gateway.delete_session(&session.id, true).await.context("deleting the session");
    let picture = picture.with_context(|| format!("watching session {}", session.id))?;
    deleted?;
    Ok(Launched { running, picture: Some(picture.saturating_duration_since(start)) })
}

/// How long the instance of a session took; none where it cannot be told.
async fn running(
    ams: &AmsClient,
    session: &SessionId,
    start: Instant,
    patience: Duration,
) -> Option<Duration> {
    const LOOK_EVERY: Duration = Duration::from_millis(20);
    let tag = [("tags", format!("session={session}"))];
    while start.elapsed() < patience {
        let found = ams.instances(&tag).await.ok()?;
        if let Some(instance) = found.first() {
            match instance.status() {
                fanlight_api::ams::InstanceStatus::Running => return Some(start.elapsed()),
                fanlight_api::ams::InstanceStatus::Error => return None,
                _ => {}
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let times: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        let spread = Spread::of(&times).expect("there are some");
        assert_eq!(
            spread,
            Spread { min: 1.0, p50: 50.0, p90: 90.0, p95: 95.0, p99: 99.0, max: 100.0, mean: 50.5 }
        );
        let one = Spread::of(&[Duration::from_micros(1234)]).expect("one");
        assert_eq!((one.min, one.p50, one.max), (1.2, 1.2, 1.2));
        assert_eq!(Spread::of(&[]), None);
    }
}
