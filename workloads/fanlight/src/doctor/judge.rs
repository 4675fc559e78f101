//! What was seen on the path of a stream, and what it means: pure functions from facts to checks.
//!
//! Every step that is broken says in words what was seen and what to do. A step that cannot be looked at, because an
//! earlier one is broken, is skipped and says because of which.

use std::{collections::BTreeMap, fmt::Display, net::SocketAddr, time::Duration};

use fanlight_api::gateway::{Application, Check, CheckStatus, Diagnosis, Region};

use super::ice::{IceUrl, Outcome, Service, Transport};

/// Tokens and credentials of TURN servers bear times; more than this is dangerous.
const MAX_CLOCK_DIFFERENCE_MS: i64 = 30_000;
/// A certificate that ends sooner is warned of.
const MIN_DAYS_LEFT: i64 = 14;
const DAY_S: i64 = 86_400;

/// Everything that was seen. What was not tried is absent.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Address of the gateway, as it was given.
    pub url: String,
    /// Whether it is the address of a stack on this machine that was found by its state folder.
    pub own_stack: bool,
    /// Region that was asked about.
    pub wanted_region: Option<String>,
    /// Application that was asked about.
    pub wanted_application: Option<String>,
    /// This machine's clock, Unix seconds.
    pub now_s: i64,
    /// The connection to the gateway.
    pub connection: Result<Connection, NoConnection>,
    /// What its TLS says; absent with plain HTTP.
    pub tls: Option<Result<Certificate, String>>,
    /// `GET /1.0/status` without a token.
    pub status: Option<Exchange<String>>,
    /// The gateway's clock less this machine's.
    pub clock_difference_ms: Option<i64>,
    /// Whether there is a token at all, and where it was looked for.
    pub token: Result<(), String>,
    /// What the token may do; absent when it could not be found out.
    pub rights: Option<Rights>,
    /// `GET /1.0/doctor`.
    pub diagnosis: Option<Exchange<Diagnosis>>,
    /// `GET /1.0/regions?recursion=true`.
    pub regions: Option<Exchange<Vec<Region>>>,
    /// `GET /1.0/applications`.
    pub applications: Option<Exchange<Vec<Application>>>,
    /// The servers of each region and what became of trying them.
    pub servers: BTreeMap<String, Vec<Server>>,
}

/// A connection that was made.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Address that answered.
    pub address: SocketAddr,
    /// How long it took.
    pub took: Duration,
}

/// Why there is no connection.
#[derive(Clone, Debug)]
pub enum NoConnection {
    /// The URL is not one of a gateway.
    Url(String),
    /// The host's name has no address.
    Resolve(String),
    /// Nobody listens there.
    Refused(SocketAddr),
    /// Nothing came back.
    Silent(SocketAddr, Duration),
    /// The system has another reason.
    Other(SocketAddr, String),
}

/// A server certificate.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// Host names and addresses in it.
    pub names: Vec<String>,
    /// Unix seconds from which it is good.
    pub not_before_s: i64,
    /// Unix seconds until which it is good.
    pub not_after_s: i64,
    /// What is wrong with it for this client.
    pub problem: Option<Problem>,
}

/// Why a certificate is not believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// No known authority has signed it.
    Authority,
    /// It is for other names.
    Name,
    /// It has ended.
    Expired,
    /// It has not begun.
    NotYet,
    /// Another reason, in words.
    Other(String),
}

/// An exchange with the gateway.
#[derive(Clone, Debug)]
pub enum Exchange<T> {
    /// It answered.
    Answer(T, Duration),
    /// It refused, in its own words where it gave any.
    Refused {
        /// HTTP status.
        status: u16,
        /// What the gateway says; absent when the answer is not a gateway's.
        text: Option<String>,
    },
    /// The answer is not what a gateway sends.
    NotUnderstood(String),
    /// There was none.
    Failed(String),
}

/// What a token may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Everything.
    Full,
    /// Launch, join and end its own sessions.
    Launch,
}

/// A STUN or TURN server that was tried.
#[derive(Clone, Debug)]
pub struct Server {
    /// As the gateway gave it.
    pub url: String,
    /// The same, taken apart.
    pub parsed: Result<IceUrl, &'static str>,
    /// What became of it.
    pub outcome: Outcome,
}

/// Judges every step in the order in which a stream takes them.
pub fn checks(facts: &Facts) -> Vec<Check> {
    let mut path = Path::default();
    connect(facts, &mut path);
    trust(facts, &mut path);
    gateway(facts, &mut path);
    time(facts, &mut path);
    token(facts, &mut path);
    diagnosis(facts, &mut path);
    region(facts, &mut path);
    application(facts, &mut path);
    servers(facts, &mut path);
    path.checks
}

/// The checks so far.
#[derive(Default)]
struct Path {
    checks: Vec<Check>,
    /// The step that makes everything after it impossible.
    broken: Option<&'static str>,
}

impl Path {
    fn add(&mut self, step: &str, status: CheckStatus, text: impl Into<String>, advice: impl Into<String>) {
        self.checks.push(Check { step: step.to_owned(), status, text: text.into(), advice: advice.into() });
    }

    fn ok(&mut self, step: &str, text: impl Into<String>) {
        self.add(step, CheckStatus::Ok, text, "");
    }

    fn skip(&mut self, step: &str, text: impl Into<String>) {
        self.add(step, CheckStatus::Skipped, text, "");
    }

    /// Skips the step when an earlier one makes it impossible.
    fn skipped(&mut self, step: &str) -> bool {
        let Some(broken) = self.broken else { return false };
        self.skip(step, format!("cannot be looked at because `{broken}` failed"));
        true
    }

    /// A failure after which nothing else can be looked at.
    fn fatal(&mut self, step: &'static str, text: impl Into<String>, advice: impl Into<String>) {
        self.add(step, CheckStatus::Failed, text, advice);
        self.broken = Some(step);
    }

    fn status_of(&self, step: &str) -> Option<CheckStatus> {
        self.checks.iter().filter(|check| check.step == step).map(|check| check.status).max()
    }
}

fn milliseconds(took: Duration) -> String {
    let ms = took.as_secs_f64() * 1000.0;
    if ms < 10.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") }
}

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

fn connect(facts: &Facts, path: &mut Path) {
    const STEP: &str = "connect";
    let start = if facts.own_stack {
        "start the stack with `fanlight up`, with the same --state"
    } else {
        "check the port in the address, and that the gateway runs"
    };
    match &facts.connection {
        Ok(Connection { address, took }) => {
            path.ok(STEP, format!("{} is reached at {address} in {}", facts.url, milliseconds(*took)));
        }
        Err(NoConnection::Url(reason)) => path.fatal(
            STEP,
            format!("{} is not the address of a gateway: {reason}", facts.url),
            "name it as https://HOST:PORT",
        ),
        Err(NoConnection::Resolve(reason)) => path.fatal(
            STEP,
            format!("the name in {} has no address: {reason}", facts.url),
            "check how the name is written, and the name server of this machine",
        ),
        Err(NoConnection::Refused(address)) => {
            path.fatal(STEP, format!("nothing listens at {address}: the gateway does not run there"), start);
        }
        Err(NoConnection::Silent(address, patience)) => path.fatal(
            STEP,
            format!("nothing comes back from {address} within {} s", patience.as_secs()),
            format!("the machine is down, or a firewall drops TCP to port {}", address.port()),
        ),
        Err(NoConnection::Other(address, reason)) => {
            path.fatal(STEP, format!("{address} cannot be reached: {reason}"), start);
        }
    }
}

fn trust(facts: &Facts, path: &mut Path) {
    const STEP: &str = "trust";
    if path.skipped(STEP) {
        return;
    }
    let certificate = match &facts.tls {
        None => {
            let own =
                matches!(&facts.connection, Ok(Connection { address, .. }) if address.ip().is_loopback());
            return if own {
                path.ok(STEP, "plain HTTP, which does not leave this machine");
            } else {
                path.add(
                    STEP,
                    CheckStatus::Warning,
                    "plain HTTP: everybody on the way can read the token",
                    "use the gateway's https:// address",
                );
            };
        }
        Some(Err(reason)) => {
            return path.fatal(
                STEP,
                format!("no encrypted connection comes about: {reason}"),
                "check that the port is the gateway's own; it speaks TLS 1.3 only",
            );
        }
        Some(Ok(certificate)) => certificate,
    };
    let days = (certificate.not_after_s - facts.now_s).div_euclid(DAY_S);
    let fail =
        |path: &mut Path, text: String, advice: &str| path.add(STEP, CheckStatus::Failed, text, advice);
    match &certificate.problem {
        None if days < MIN_DAYS_LEFT => path.add(
            STEP,
            CheckStatus::Warning,
            format!("the certificate is trusted, but ends in {days} days"),
            "renew it; the gateway takes the new files without a restart",
        ),
        None => path.ok(STEP, format!("the certificate is trusted and good for {days} days")),
        Some(Problem::Authority) => fail(
            path,
            "the certificate is signed by an authority that is not known here".into(),
            "name the authority's file with --ca, or give the gateway a certificate of a known one",
        ),
        Some(Problem::Name) => fail(
            path,
            format!("the certificate is for {}, not for {}", list(&certificate.names), facts.url),
            "use a name that the certificate has, or give the gateway one for this name",
        ),
        Some(Problem::Expired) => fail(
            path,
            format!("the certificate ended {} days ago by this machine's clock", -days),
            "renew it, unless the step `time` shows that a clock is wrong",
        ),
        Some(Problem::NotYet) => fail(
            path,
            format!(
                "the certificate is good only in {} days by this machine's clock",
                (certificate.not_before_s - facts.now_s).div_euclid(DAY_S) + 1
            ),
            "set this machine's clock; if it is right, the certificate was made with a wrong one",
        ),
        Some(Problem::Other(reason)) => fail(
            path,
            format!("the certificate is not usable: {reason}"),
            "give the gateway another certificate",
        ),
    }
}

fn gateway(facts: &Facts, path: &mut Path) {
    const STEP: &str = "gateway";
    if path.skipped(STEP) {
        return;
    }
    match &facts.status {
        None => path.fatal(STEP, "the gateway was not asked for its status", ""),
        Some(Exchange::Answer(health, took)) if health == "healthy" => {
            path.ok(STEP, format!("a healthy gateway answers in {}", milliseconds(*took)));
        }
        Some(Exchange::Answer(health, _)) => path.add(
            STEP,
            CheckStatus::Warning,
            format!("the gateway says that it is {health}"),
            "the steps below name what is wrong; with a token they are the gateway's own",
        ),
        Some(Exchange::Refused { status: status @ (502..=504), text: None }) => path.fatal(
            STEP,
            format!("a proxy answers with HTTP status {status}: no gateway is up behind it"),
            "start the gateway, and check which address the proxy passes requests on to",
        ),
        Some(Exchange::Refused { status: 429, .. }) => path.fatal(
            STEP,
            "the gateway takes no more requests for the moment (429)",
            "wait a little; if that stays, more comes in than its limits allow",
        ),
        Some(Exchange::Refused { status, text: Some(text) }) => path.fatal(
            STEP,
            format!("the gateway answers with HTTP status {status}: {text}"),
            "the gateway's log says more",
        ),
        Some(Exchange::Refused { status, text: None }) => path.fatal(
            STEP,
            format!("what answers there is no gateway (HTTP status {status})"),
            "check host and port of the address",
        ),
        Some(Exchange::NotUnderstood(reason)) => path.fatal(
            STEP,
            format!("what answers there is no gateway: {reason}"),
            "check host and port of the address",
        ),
        Some(Exchange::Failed(reason)) => path.fatal(
            STEP,
            format!("the gateway does not answer: {reason}"),
            if facts.tls.is_none() {
                "if it speaks HTTPS, as gateways do, name its https:// address"
            } else {
                "the gateway's log says more; if it does not show the request, something in between keeps it"
            },
        ),
    }
}

fn time(facts: &Facts, path: &mut Path) {
    const STEP: &str = "time";
    if path.skipped(STEP) {
        return;
    }
    match facts.clock_difference_ms {
        None => path.skip(STEP, "the gateway does not say what time it has"),
        Some(difference) if difference.abs() > MAX_CLOCK_DIFFERENCE_MS => path.add(
            STEP,
            CheckStatus::Warning,
            format!(
                "this machine's clock is {} s {} the gateway's",
                difference.abs() / 1000,
                if difference > 0 { "behind" } else { "ahead of" }
            ),
            "set the clocks by time servers: tokens and TURN credentials end too early or too late",
        ),
        Some(difference) => {
            let seconds = difference.abs() as f64 / 1000.0;
            path.ok(STEP, format!("the clocks of this machine and of the gateway are within {seconds:.1} s"));
        }
    }
}

fn token(facts: &Facts, path: &mut Path) {
    const STEP: &str = "token";
    // A token must not be shown to somebody who does not prove to be the gateway.
    if path.broken.is_none() && path.status_of("trust") == Some(CheckStatus::Failed) {
        path.broken = Some("trust");
    }
    if path.skipped(STEP) {
        return;
    }
    if let Err(where_) = &facts.token {
        return path.fatal(
            STEP,
            format!("there is no API token: {where_}"),
            "`fanlight account create NAME` makes one where the gateway runs",
        );
    }
    let refused = [
        facts.diagnosis.as_ref().and_then(Exchange::refusal),
        facts.regions.as_ref().and_then(Exchange::refusal),
    ];
    if let Some((_, text)) = refused.iter().flatten().find(|(status, _)| *status == 401) {
        return path.fatal(
            STEP,
            format!("the gateway does not take the token: {}", text.as_deref().unwrap_or("401")),
            "check that it is whole, is of this gateway and has not expired; \
             `fanlight account list` shows the accounts, `fanlight account create NAME` makes a new token",
        );
    }
    let asked = [facts.diagnosis.is_some(), facts.regions.is_some()];
    if asked == [false, false] {
        return path.skip(STEP, "no request was made with it");
    }
    path.ok(
        STEP,
        match facts.rights {
            Some(Rights::Full) => "the gateway takes the token; it may do everything",
            Some(Rights::Launch) => {
                "the gateway takes the token; it may launch, join and end its own sessions"
            }
            None => "the gateway takes the token",
        },
    );
}

impl<T> Exchange<T> {
    /// The same exchange with another answer.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Exchange<U> {
        match self {
            Self::Answer(answer, took) => Exchange::Answer(change(answer), took),
            Self::Refused { status, text } => Exchange::Refused { status, text },
            Self::NotUnderstood(reason) => Exchange::NotUnderstood(reason),
            Self::Failed(reason) => Exchange::Failed(reason),
        }
    }

    fn refusal(&self) -> Option<(u16, Option<String>)> {
        match self {
            Self::Refused { status, text } => Some((*status, text.clone())),
            _ => None,
        }
    }

    fn answer(&self) -> Option<&T> {
        match self {
            Self::Answer(answer, _) => Some(answer),
            _ => None,
        }
    }
}

/// Takes the gateway's own checks over, or says why there are none.
fn diagnosis(facts: &Facts, path: &mut Path) {
    const STEP: &str = "diagnosis";
    if path.skipped(STEP) {
        return;
    }
    match &facts.diagnosis {
        None => path.skip(STEP, "the gateway was not asked about itself"),
        Some(Exchange::Answer(diagnosis, _)) => path.checks.extend(diagnosis.checks.iter().cloned()),
        Some(Exchange::Refused { status: 404 | 405, .. }) => {
            path.skip(STEP, "this gateway cannot look at itself (it does not know /1.0/doctor)");
        }
        Some(Exchange::Refused { status: 403, .. }) => {
            path.skip(STEP, "this token may not ask the gateway about itself");
        }
        Some(Exchange::Refused { status, text }) => path.add(
            STEP,
            CheckStatus::Failed,
            format!(
                "the gateway could not look at itself ({status}): {}",
                text.as_deref().unwrap_or("no reason")
            ),
            "the gateway's log says more",
        ),
        Some(Exchange::NotUnderstood(reason)) => path.add(
            STEP,
            CheckStatus::Warning,
            format!("what the gateway says about itself cannot be understood: {reason}"),
            "use the fanlight command of the gateway's version",
        ),
        Some(Exchange::Failed(reason)) => path.add(
            STEP,
            CheckStatus::Failed,
            format!("the gateway does not say how it is: {reason}"),
            "it answers other requests, so something behind it hangs: its log says what",
        ),
    }
}

/// Names of the regions that the gateway offers.
fn region_names(facts: &Facts) -> Option<Vec<String>> {
    facts.regions.as_ref()?.answer().map(|regions| regions.iter().map(|region| region.name.clone()).collect())
}

fn region(facts: &Facts, path: &mut Path) {
    const STEP: &str = "region";
    if path.skipped(STEP) {
        return;
    }
    let Some(names) = region_names(facts) else {
        return path.skip(STEP, "the gateway does not list its regions");
    };
    match &facts.wanted_region {
        _ if names.is_empty() => {
            if path.status_of("agents") == Some(CheckStatus::Failed) {
                path.skip(STEP, "there is none because `agents` failed");
            } else {
                path.add(
                    STEP,
                    CheckStatus::Failed,
                    "there is no region: no agent reports to the gateway",
                    "check that an agent runs and that it uses the same bus as the gateway",
                );
            }
        }
        Some(wanted) if !names.contains(wanted) => path.add(
            STEP,
            CheckStatus::Failed,
            format!("there is no region {wanted}; there are {}", list(&names)),
            "ask for one of these, or start an agent of that region",
        ),
        Some(wanted) => path.ok(STEP, format!("region {wanted} is there")),
        None if names.len() == 1 => path.ok(STEP, format!("there is one region, {}", names[0])),
        None => path.ok(STEP, format!("there are {} regions: {}", names.len(), list(&names))),
    }
}

fn application(facts: &Facts, path: &mut Path) {
    const STEP: &str = "application";
    let Some(wanted) = &facts.wanted_application else { return };
    if path.skipped(STEP) {
        return;
    }
    let Some(known) = facts.applications.as_ref().and_then(Exchange::answer) else {
        return path.skip(STEP, "the gateway does not list its applications");
    };
    if known.iter().any(|application| application.name == *wanted) {
        return path.ok(STEP, format!("application {wanted} can be launched"));
    }
    if known.is_empty() && path.status_of("agents") == Some(CheckStatus::Failed) {
        return path.skip(STEP, "there is none because `agents` failed");
    }
    let there = if known.is_empty() {
        "there is none".to_owned()
    } else {
        format!("there are {}", list(known.iter().map(|application| &application.name)))
    };
    path.add(
        STEP,
        CheckStatus::Failed,
        format!("there is no application {wanted} to launch; {there}"),
        "check its name, and in AMS that a version of it is published",
    );
}

/// The ways of the media: STUN and TURN servers of every region.
fn servers(facts: &Facts, path: &mut Path) {
    if path.broken.is_some() {
        path.skipped("udp");
        path.skipped("relay");
        return;
    }
    if facts.servers.is_empty() {
        let reason = match path.status_of("region") {
            Some(CheckStatus::Ok) => "the gateway does not say which STUN and TURN servers there are",
            Some(CheckStatus::Failed) => "cannot be looked at because `region` failed",
            _ => "no region is known, so there is no server to try",
        };
        path.skip("udp", reason);
        path.skip("relay", reason);
        return;
    }
    for (region, servers) in &facts.servers {
        let of = |service| {
            servers
                .iter()
                .filter(move |server| server.parsed.as_ref().is_ok_and(|url| url.service == service))
                .collect::<Vec<_>>()
        };
        let (stun, turn) = (of(Service::Stun), of(Service::Turn));
        udp(region, &stun, &turn, path);
        relay(region, &turn, path);
        for server in servers {
            if let Err(reason) = server.parsed {
                path.add(
                    "relay",
                    CheckStatus::Warning,
                    format!("region {region}: {} cannot be used: {reason}", server.url),
                    "correct it in the settings of the region's agents",
                );
            }
        }
    }
}

fn over(server: &Server, transport: Transport) -> bool {
    server.parsed.as_ref().is_ok_and(|url| url.transport == transport)
}

fn udp(region: &str, stun: &[&Server], turn: &[&Server], path: &mut Path) {
    const STEP: &str = "udp";
    if stun.is_empty() {
        let text = if turn.is_empty() {
            format!("region {region} has no STUN server: streams go straight to the instances' addresses")
        } else {
            format!("region {region} has no STUN server; whether UDP gets through shows with the relay")
        };
        return path.skip(STEP, text);
    }
    let good = |server: &&&Server| server.outcome.is_good();
    let told: Vec<String> = stun.iter().filter(good).map(|server| told(server)).collect();
    let silent: Vec<&&Server> = stun.iter().filter(|server| !server.outcome.is_good()).collect();
    if silent.is_empty() {
        return path.ok(STEP, format!("region {region}: {}", told.join("; ")));
    }
    let problems = silent.iter().map(|server| trouble(server)).collect::<Vec<_>>().join("; ");
    if !told.is_empty() {
        return path.add(
            STEP,
            CheckStatus::Warning,
            format!("region {region}: UDP gets through, but {problems}"),
            "start these servers, or take them out of the settings of the region's agents",
        );
    }
    // Nothing that speaks STUN answered. A TURN server that did shows which of the two it is: the servers, or UDP.
    if turn.iter().any(|server| over(server, Transport::Udp) && server.outcome.is_answer()) {
        return path.add(
            STEP,
            CheckStatus::Warning,
            format!("region {region}: UDP gets through to the TURN server, but {problems}"),
            "start these STUN servers, or take them out of the settings of the region's agents",
        );
    }
    let ports = list(silent.iter().filter_map(|server| {
        let url = server.parsed.as_ref().ok()?;
        Some(format!("{} port {}", url.host, url.port))
    }));
    if turn.iter().any(|server| !over(server, Transport::Udp) && server.outcome.is_good()) {
        return path.add(
            STEP,
            CheckStatus::Warning,
            format!("region {region}: UDP does not get through ({problems}); streams take the relay over TCP, with more delay"),
            format!("let UDP from here to {ports} through the firewalls on the way"),
        );
    }
    path.add(
        STEP,
        CheckStatus::Failed,
        format!("region {region}: UDP does not get through: {problems}"),
        format!(
            "let UDP from here to {ports} through the firewalls on the way, or offer a TURN server over TCP; \
             if others get through, the servers are fine"
        ),
    );
}

fn relay(region: &str, turn: &[&Server], path: &mut Path) {
    const STEP: &str = "relay";
    if turn.is_empty() {
        return path.skip(
            STEP,
            format!("region {region} has no TURN server: only clients that reach the instances' addresses get streams"),
        );
    }
    let given: Vec<String> =
        turn.iter().filter(|server| server.outcome.is_good()).map(|server| told(server)).collect();
    let Some(first) = turn.iter().find(|server| !server.outcome.is_good()) else {
        return path.ok(STEP, format!("region {region}: {}", given.join("; ")));
    };
    let problems = turn
        .iter()
        .filter(|server| !server.outcome.is_good())
        .map(|server| trouble(server))
        .collect::<Vec<_>>()
        .join("; ");
    let advice = relay_advice(first);
    if given.is_empty() {
        return path.add(
            STEP,
            CheckStatus::Failed,
            format!("region {region}: no TURN server gives a relay: {problems}"),
            advice,
        );
    }
    path.add(
        STEP,
        CheckStatus::Warning,
        format!("region {region}: {}, but {problems}", given.join("; ")),
        advice,
    );
}

/// What a server gave, in words.
fn told(server: &Server) -> String {
    let Outcome::Given { took, .. } = &server.outcome else { return trouble(server) };
    let is_turn = server.parsed.as_ref().is_ok_and(|url| url.service == Service::Turn);
    let what = if is_turn { "gives a relay" } else { "answers" };
    format!("{} {what} in {}", server.url, milliseconds(*took))
}

/// Why a server gave nothing, in words.
fn trouble(server: &Server) -> String {
    let url = &server.url;
    match &server.outcome {
        Outcome::Given { .. } => told(server),
        Outcome::Refused { code: 0, reason } => format!("{url}: {reason}"),
        Outcome::Refused { code, reason } => format!("{url} refuses with {code} {reason}"),
        Outcome::Silent => format!("{url} does not answer"),
        Outcome::Unreachable(reason) => format!("{url} cannot be reached: {reason}"),
        Outcome::Unresolved(reason) => format!("{url} has no address: {reason}"),
        Outcome::Unusable(reason) => format!("{url} was not tried: {reason}"),
    }
}

fn relay_advice(server: &Server) -> String {
    let place = server.parsed.as_ref().map_or_else(
        |_| server.url.clone(),
        |url| format!("{} to {} port {}", url.transport, url.host, url.port),
    );
    match &server.outcome {
        Outcome::Refused { code: 401 | 441 | 0, .. } => {
            "the secret of the TURN server and that of the region's agents must be the same, and their clocks right".into()
        }
        Outcome::Refused { code: 403, .. } => "the TURN server's settings forbid this client or this kind of relay".into(),
        Outcome::Refused { code: 486, .. } => "raise the TURN server's quota of relays for one user, or wait".into(),
        Outcome::Refused { code: 508, .. } => "give the TURN server more ports for relays, or another server".into(),
        Outcome::Refused { .. } => "the TURN server's log says more".into(),
        Outcome::Silent => format!("let {place} through the firewalls on the way, and check that the server runs"),
        Outcome::Unreachable(_) => format!("start the TURN server there, and let {place} through"),
        Outcome::Unresolved(_) => "correct the name in the settings of the region's agents, or in the name server".into(),
        Outcome::Unusable(_) | Outcome::Given { .. } => {
            "give the region's agents the secret of the TURN server, so that they can make credentials".into()
        }
    }
}

#[cfg(test)]
mod tests {
    use CheckStatus::{Failed, Ok as Good, Skipped, Warning};
    use fanlight_api::gateway::StunServer;

    use super::*;

    const NOW: i64 = 1_800_000_000;
    const QUICK: Duration = Duration::from_millis(3);

    fn address() -> SocketAddr {
        "192.0.2.7:4000".parse().expect("an address")
    }

    fn own(step: &str, status: CheckStatus) -> Check {
        Check { step: step.into(), status, text: "said by the gateway".into(), advice: String::new() }
    }

    fn server(url: &str, outcome: Outcome) -> Server {
        Server { url: url.into(), parsed: IceUrl::parse(url), outcome }
    }

    fn given() -> Outcome {
        Outcome::Given { address: address(), took: QUICK }
    }

    fn refused(code: u16) -> Outcome {
        Outcome::Refused { code, reason: "in its words".into() }
    }

    fn certificate(problem: Option<Problem>) -> Certificate {
        Certificate {
            names: vec!["other.example".into(), "192.0.2.1".into()],
            not_before_s: NOW - 10 * DAY_S,
            not_after_s: NOW + 90 * DAY_S,
            problem,
        }
    }

    /// A path without a flaw.
    fn fine() -> Facts {
        let region = |name: &str| Region { name: name.into(), ..Region::default() };
        let application = Application { name: "terminal".into(), ..Application::default() };
        let diagnosis = Diagnosis {
            time_ms: NOW * 1000,
            checks: vec![own("store", Good), own("agents", Good), own("capacity", Good)],
            stun_servers: BTreeMap::from([("here".into(), vec![StunServer::default()])]),
        };
        Facts {
            url: "https://gateway.example:4000".into(),
            own_stack: false,
            wanted_region: Some("here".into()),
            wanted_application: Some("terminal".into()),
            now_s: NOW,
            connection: Ok(Connection { address: address(), took: QUICK }),
            tls: Some(Ok(certificate(None))),
            status: Some(Exchange::Answer("healthy".into(), QUICK)),
            clock_difference_ms: Some(120),
            token: Ok(()),
            rights: Some(Rights::Full),
            diagnosis: Some(Exchange::Answer(diagnosis, QUICK)),
            regions: Some(Exchange::Answer(vec![region("here"), region("there")], QUICK)),
            applications: Some(Exchange::Answer(vec![application], QUICK)),
            servers: BTreeMap::from([(
                "here".into(),
                vec![
                    server("stun:s.example", given()),
                    server("turn:t.example:3478", given()),
                    server("turn:t.example:443?transport=tcp", given()),
                ],
            )]),
        }
    }

    fn broken(change: impl FnOnce(&mut Facts)) -> Vec<Check> {
        let mut facts = fine();
        change(&mut facts);
        checks(&facts)
    }

    fn with_servers(servers: Vec<Server>) -> Vec<Check> {
        broken(|facts| facts.servers = BTreeMap::from([("here".into(), servers)]))
    }

    fn find<'a>(checks: &'a [Check], step: &str) -> &'a Check {
        checks
            .iter()
            .find(|check| check.step == step)
            .unwrap_or_else(|| panic!("no step {step} in {checks:#?}"))
    }

    #[track_caller]
    fn expect(checks: &[Check], step: &str, status: CheckStatus, text: &str, advice: &str) {
        let check = find(checks, step);
        assert_eq!(check.status, status, "{check:?}");
        assert!(check.text.contains(text), "{text:?} is not in {check:?}");
        assert!(check.advice.contains(advice), "{advice:?} is not in {check:?}");
        assert_eq!(
            check.advice.is_empty(),
            status < Warning,
            "advice is for what is not as it should be: {check:?}"
        );
    }

    /// The step is the only one that failed, and everything after it is skipped because of it.
    #[track_caller]
    fn expect_end(checks: &[Check], step: &str, text: &str, advice: &str) {
        expect(checks, step, Failed, text, advice);
        let at = checks.iter().position(|check| check.step == step).expect("it was found above");
        for later in &checks[at + 1..] {
            assert_eq!(later.status, Skipped, "{later:?}");
            assert!(later.text.contains(&format!("`{step}`")), "{later:?}");
        }
        for step in ["token", "udp", "relay"] {
            find(checks, step);
        }
    }

    #[test]
    fn a_path_without_a_flaw_is_told_in_the_order_of_a_stream() {
        let checks = checks(&fine());
        let steps: Vec<&str> = checks.iter().map(|check| check.step.as_str()).collect();
        assert_eq!(
            steps,
            [
                "connect",
                "trust",
                "gateway",
                "time",
                "token",
                "store",
                "agents",
                "capacity",
                "region",
                "application",
                "udp",
                "relay"
            ]
        );
        for check in &checks {
            assert_eq!((check.status, check.advice.as_str()), (Good, ""), "{check:?}");
        }
        assert!(find(&checks, "trust").text.contains("90 days"));
    }

    #[test]
    fn a_gateway_that_is_not_reached_ends_the_path() {
        let at = |reason: NoConnection| broken(|facts| facts.connection = Err(reason));
        expect_end(
            &at(NoConnection::Url("no host".into())),
            "connect",
            "not the address of a gateway",
            "https://",
        );
        expect_end(
            &at(NoConnection::Resolve("unknown".into())),
            "connect",
            "no address: unknown",
            "name server",
        );
        expect_end(
            &at(NoConnection::Refused(address())),
            "connect",
            "nothing listens at 192.0.2.7:4000",
            "port",
        );
        expect_end(
            &at(NoConnection::Silent(address(), Duration::from_secs(5))),
            "connect",
            "within 5 s",
            "TCP to port 4000",
        );
        expect_end(
            &at(NoConnection::Other(address(), "no route".into())),
            "connect",
            "no route",
            "gateway runs",
        );
        let own = broken(|facts| {
            facts.own_stack = true;
            facts.connection = Err(NoConnection::Refused(address()));
        });
        expect_end(&own, "connect", "nothing listens", "fanlight up");
    }

    #[test]
    fn a_certificate_that_is_not_believed_keeps_the_token_at_home() {
        for (problem, text, advice) in [
            (Problem::Authority, "authority that is not known", "--ca"),
            (Problem::Name, "other.example, 192.0.2.1, not for https://gateway.example:4000", "name"),
            (Problem::NotYet, "only in", "clock"),
            (Problem::Other("odd".into()), "odd", "another certificate"),
        ] {
            let checks = broken(|facts| facts.tls = Some(Ok(certificate(Some(problem)))));
            expect(&checks, "trust", Failed, text, advice);
            // What needs no secret is looked at all the same.
            assert_eq!(find(&checks, "gateway").status, Good);
            assert_eq!(find(&checks, "token").status, Skipped);
            assert!(find(&checks, "relay").text.contains("`trust`"));
        }
        let ended = Certificate { not_after_s: NOW - 3 * DAY_S, ..certificate(Some(Problem::Expired)) };
        expect(&broken(|facts| facts.tls = Some(Ok(ended))), "trust", Failed, "ended 3 days ago", "renew");
        let ending = Certificate { not_after_s: NOW + 5 * DAY_S, ..certificate(None) };
        expect(&broken(|facts| facts.tls = Some(Ok(ending))), "trust", Warning, "ends in 5 days", "renew");
        let none = broken(|facts| facts.tls = Some(Err("wrong version".into())));
        expect_end(&none, "trust", "wrong version", "TLS 1.3");
    }

    #[test]
    fn plain_http_is_for_one_machine() {
        expect(&broken(|facts| facts.tls = None), "trust", Warning, "can read the token", "https://");
        let own = broken(|facts| {
            facts.tls = None;
            let address = "127.0.0.1:4000".parse().expect("an address");
            facts.connection = Ok(Connection { address, took: QUICK });
        });
        expect(&own, "trust", Good, "this machine", "");
    }

    #[test]
    fn what_is_no_gateway_ends_the_path() {
        let refused =
            |status, text: Option<&str>| Exchange::Refused { status, text: text.map(str::to_owned) };
        for (status, text, advice) in [
            (refused(502, None), "a proxy answers with HTTP status 502", "start the gateway"),
            (refused(429, Some("slow down")), "429", "wait"),
            (refused(500, Some("store is gone")), "store is gone", "log"),
            (refused(404, None), "no gateway (HTTP status 404)", "host and port"),
            (Exchange::NotUnderstood("a page".into()), "no gateway: a page", "host and port"),
            (Exchange::Failed("cut off".into()), "cut off", "log"),
        ] {
            expect_end(&broken(|facts| facts.status = Some(status)), "gateway", text, advice);
        }
        let plain = broken(|facts| {
            facts.tls = None;
            facts.status = Some(Exchange::Failed("odd".into()));
        });
        expect_end(&plain, "gateway", "odd", "https://");
        let ill = broken(|facts| facts.status = Some(Exchange::Answer("unhealthy".into(), QUICK)));
        expect(&ill, "gateway", Warning, "unhealthy", "below");
        assert_eq!(find(&ill, "relay").status, Good);
    }

    #[test]
    fn clocks_that_differ_are_warned_of_in_both_directions() {
        let by = |difference| broken(|facts| facts.clock_difference_ms = Some(difference));
        expect(&by(90_000), "time", Warning, "90 s behind", "time servers");
        expect(&by(-45_500), "time", Warning, "45 s ahead", "time servers");
        expect(&by(-29_000), "time", Good, "29.0 s", "");
        expect(&broken(|facts| facts.clock_difference_ms = None), "time", Skipped, "does not say", "");
    }

    #[test]
    fn a_token_that_is_missing_or_not_taken_ends_the_path() {
        let none = broken(|facts| facts.token = Err("the file is empty".into()));
        expect_end(&none, "token", "the file is empty", "fanlight account create");
        let wrong = broken(|facts| {
            let text = Some("this token is not known".to_owned());
            facts.diagnosis = Some(Exchange::Refused { status: 401, text });
            facts.regions = Some(Exchange::Refused { status: 401, text: None });
        });
        expect_end(&wrong, "token", "this token is not known", "fanlight account list");
        let launch = broken(|facts| facts.rights = Some(Rights::Launch));
        expect(&launch, "token", Good, "end its own sessions", "");
    }

    #[test]
    fn what_the_gateway_says_of_itself_is_taken_over() {
        let checks = broken(|facts| {
            if let Some(Exchange::Answer(diagnosis, _)) = &mut facts.diagnosis {
                diagnosis.checks = vec![own("store", Good), own("agents", Failed)];
                diagnosis.stun_servers.clear();
            }
            facts.regions = Some(Exchange::Answer(vec![], QUICK));
            facts.applications = Some(Exchange::Answer(vec![], QUICK));
            facts.servers.clear();
        });
        assert_eq!(find(&checks, "agents"), &own("agents", Failed));
        // One cause is told once.
        expect(&checks, "region", Skipped, "`agents`", "");
        expect(&checks, "application", Skipped, "`agents`", "");
        expect(&checks, "udp", Skipped, "no region", "");
        assert_eq!(checks.iter().filter(|check| check.status == Failed).count(), 1, "{checks:#?}");
    }

    #[test]
    fn a_gateway_that_says_nothing_of_itself_does_not_end_the_path() {
        let saying = |exchange| broken(|facts| facts.diagnosis = Some(exchange));
        let refused = |status| Exchange::Refused { status, text: Some("no".into()) };
        expect(&saying(refused(404)), "diagnosis", Skipped, "/1.0/doctor", "");
        expect(&saying(refused(403)), "diagnosis", Skipped, "may not ask", "");
        expect(&saying(refused(500)), "diagnosis", Failed, "(500): no", "log");
        expect(&saying(Exchange::NotUnderstood("odd".into())), "diagnosis", Warning, "odd", "version");
        expect(&saying(Exchange::Failed("late".into())), "diagnosis", Failed, "late", "log");
        assert_eq!(find(&saying(refused(404)), "udp").status, Good);
    }

    #[test]
    fn regions_and_applications_that_are_not_there_are_named_with_those_that_are() {
        let elsewhere = broken(|facts| facts.wanted_region = Some("moon".into()));
        expect(&elsewhere, "region", Failed, "no region moon; there are here, there", "one of these");
        let lost = broken(|facts| {
            facts.wanted_region = Some("moon".into());
            facts.servers.clear();
        });
        expect(&lost, "udp", Skipped, "`region`", "");
        let none = broken(|facts| facts.regions = Some(Exchange::Answer(vec![], QUICK)));
        expect(&none, "region", Failed, "no agent reports", "bus");
        let app = broken(|facts| facts.wanted_application = Some("chess".into()));
        expect(
            &app,
            "application",
            Failed,
            "no application chess to launch; there are terminal",
            "published",
        );
        let empty = broken(|facts| facts.applications = Some(Exchange::Answer(vec![], QUICK)));
        expect(&empty, "application", Failed, "there is none", "published");
        let unasked = broken(|facts| facts.wanted_application = None);
        assert!(unasked.iter().all(|check| check.step != "application"));
    }

    #[test]
    fn udp_that_does_not_get_through_is_told_from_servers_that_are_down() {
        let silent = || server("stun:s.example:3479", Outcome::Silent);
        let one = with_servers(vec![server("stun:a.example", given()), silent()]);
        expect(&one, "udp", Warning, "UDP gets through, but stun:s.example:3479 does not answer", "start");
        let turn = with_servers(vec![silent(), server("turn:t.example", given())]);
        expect(&turn, "udp", Warning, "gets through to the TURN server", "start these STUN servers");
        let refused = with_servers(vec![silent(), server("turn:t.example", refused(401))]);
        expect(&refused, "udp", Warning, "gets through to the TURN server", "");
        let tcp = with_servers(vec![silent(), server("turn:t.example?transport=tcp", given())]);
        expect(&tcp, "udp", Warning, "relay over TCP", "s.example port 3479");
        let nothing = with_servers(vec![silent(), server("turn:t.example", Outcome::Silent)]);
        expect(&nothing, "udp", Failed, "UDP does not get through", "s.example port 3479");
        let lost = Outcome::Unresolved("unknown".into());
        let lost = with_servers(vec![server("stun:nowhere.example", lost)]);
        expect(&lost, "udp", Failed, "nowhere.example has no address: unknown", "firewalls");
    }

    #[test]
    fn each_way_in_which_a_relay_is_not_given_has_its_advice() {
        let only =
            |outcome| with_servers(vec![server("stun:s", given()), server("turn:t.example:3478", outcome)]);
        for (outcome, text, advice) in [
            (refused(401), "refuses with 401 in its words", "secret"),
            (refused(441), "441", "secret"),
            (refused(0), "in its words", "secret"),
            (refused(403), "403", "forbid"),
            (refused(486), "486", "quota"),
            (refused(508), "508", "ports"),
            (refused(500), "500", "log"),
            (Outcome::Silent, "does not answer", "let UDP to t.example port 3478 through"),
            (Outcome::Unreachable("nothing listens".into()), "nothing listens", "start the TURN server"),
            (Outcome::Unresolved("unknown".into()), "unknown", "correct the name"),
            (Outcome::Unusable("no password".into()), "was not tried: no password", "credentials"),
        ] {
            expect(&only(outcome), "relay", Failed, text, advice);
        }
        let tcp = Outcome::Unreachable("nothing listens".into());
        let half = with_servers(vec![
            server("stun:s", given()),
            server("turn:t.example", given()),
            server("turn:t.example?transport=tcp", tcp),
        ]);
        expect(
            &half,
            "relay",
            Warning,
            "gives a relay in 3.0 ms, but turn:t.example?transport=tcp",
            "TCP to t.example",
        );
    }

    #[test]
    fn a_region_without_servers_or_with_wrong_urls_is_said_so() {
        let without = with_servers(vec![]);
        expect(&without, "udp", Skipped, "straight to the instances", "");
        expect(&without, "relay", Skipped, "no TURN server", "");
        let wrong = with_servers(vec![
            server("stun:s", given()),
            server("turn:t", given()),
            server("http://t", Outcome::Unusable("no".into())),
        ]);
        let found = wrong.iter().filter(|check| check.step == "relay").map(|check| check.status);
        assert_eq!(found.collect::<Vec<_>>(), [Good, Warning]);
    }
}
