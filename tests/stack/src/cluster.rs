//! Several units of everything, as an operator would run them: three `nats-server`s, three members of etcd, two
//! gateways over them, and cells of AMS and agent. Each part is a real program that can be killed, frozen and started
//! again by its name.
//!
//! | part | names |
//! |---|---|
//! | NATS servers, joined by routes; TLS and a password | `nats-0` to `nats-2` |
//! | members of etcd; TLS with client certificates | `etcd-0` to `etcd-2` |
//! | gateways | `gateway-0`, `gateway-1` |
//! | cells: AMS with the process engine, and its agent | `ams-north`, `agent-north`; `ams-south`, `agent-south` |

mod parts;
mod stream;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::StreamExt;
use reqwest::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    net::TcpStream,
    process::{Child, Command},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    BOOT, SOON, processes,
    rest::{Answer, Server},
    simulated::Simulated,
    stack::{Application, pack, write_applications},
    until,
};

use parts::{
    Certificates, PASSWORD, Part, Sign, USER, cell_of, clock_library, free_ports, member, nats_server, ours,
    text,
};
pub use stream::Stream;

/// The gateways.
pub const GATEWAYS: [&str; 2] = ["gateway-0", "gateway-1"];
/// The NATS servers.
pub const NATS: [&str; 3] = ["nats-0", "nats-1", "nats-2"];
/// The members of etcd.
pub const ETCD: [&str; 3] = ["etcd-0", "etcd-1", "etcd-2"];
/// The cells, each in a region of this name.
pub const CELLS: [&str; 2] = ["north", "south"];
/// How long every view may take to agree after a part was away.
pub const AGREEMENT: Duration = Duration::from_secs(30);
/// How long a part may take to start and to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// What all keys of the gateways begin with.
const PREFIX: &str = "/fanlight/gateway/";

/// What a cluster is made of.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// How many cells, at most two.
    pub cells: usize,
    /// What the cells can run.
    pub applications: &'a [Application],
    /// Parts whose clock the test sets with [`Cluster::set_clock`].
    pub clocks: &'a [&'a str],
}

/// A running cluster. Dropping it kills everything; [`Cluster::end`] looks for leaks first.
pub struct Cluster {
    parts: BTreeMap<String, Part>,
    /// The gateways, each with the token of an account with all rights.
    pub gateways: Vec<Server>,
    ams: BTreeMap<&'static str, Server>,
    etcd: Vec<Server>,
    bus: async_nats::Client,
    reports: Arc<Mutex<BTreeMap<String, BTreeSet<String>>>>,
    listener: JoinHandle<()>,
    folder: TempDir,
}

impl Cluster {
    /// Starts everything and waits until it works.
    ///
    /// # Errors
    /// A part does not start; the text holds what it wrote.
    pub async fn start(plan: Plan<'_>) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("fl-").tempdir().context("making a folder")?;
        // Instances run from below it as another user.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711))?;
        let certificates = Certificates::new(folder.path().join("certificates"))?;
        let mut addresses = free_ports(14 + 2 * plan.cells)?.into_iter();
        let mut take = |count: usize| addresses.by_ref().take(count).collect::<Vec<_>>();
        let mut parts = BTreeMap::new();

        let (nats, routes) = (take(3), take(3));
        for n in 0..3 {
            parts.insert(NATS[n].to_owned(), nats_server(folder.path(), &certificates, n, nats[n], &routes)?);
        }
        let password = folder.path().join("bus-password");
        fs::write(&password, PASSWORD)?;
        let urls: Vec<String> = nats.iter().map(|address| format!("tls://{address}")).collect();
        let bus = json!({
            "url": urls.join(","), "ca": text(&certificates.ca()), "user": USER, "password_file": text(&password),
        });

        let (members, peers) = (take(3), take(3));
        let mut etcd = Vec::new();
        let (certificate, key) = certificates.of("admin")?;
        for n in 0..3 {
            let identity = Some((certificate.as_path(), key.as_path()));
            etcd.push(Server::new(&format!("https://{}", members[n]), &certificates.ca(), None, identity)?);
            let sign = Sign::Answers(etcd[n].clone(), "/health", "true");
            parts
                .insert(ETCD[n].to_owned(), member(folder.path(), &certificates, n, &members, &peers, sign)?);
        }
        let (certificate, key) = certificates.of("store")?;
        let addresses: Vec<String> = members.iter().map(ToString::to_string).collect();
        let store = json!({
            "url": format!("etcds://{}", addresses.join(",")), "ca": text(&certificates.ca()),
            "certificate": text(&certificate), "key": text(&key),
        });

        let mut gateways = Vec::new();
        for (name, address) in GATEWAYS.into_iter().zip(take(2)) {
            let (certificate, key) = certificates.of(name)?;
            let server = Server::new(&format!("https://{address}"), &certificates.ca(), None, None)?;
            let sign = Sign::Answers(server.clone(), "/1.0/status", "\"healthy\"");
            gateways.push(server);
            let settings = json!({
                "unit": name, "listen": address.to_string(),
                "internal_socket": text(&folder.path().join(format!("{name}.sock"))),
                "tls": { "certificate": text(&certificate), "key": text(&key) },
                "bus": bus, "store": store,
            });
            parts.insert(name.to_owned(), ours("fanlight-gateway", folder.path(), name, &settings, sign)?);
        }

        let mut ams = BTreeMap::new();
        for (number, cell) in CELLS.into_iter().enumerate().take(plan.cells) {
            let (server, made) =
                cell_of(folder.path(), &certificates, number, cell, [take(1)[0], take(1)[0]], &bus)?;
            ams.insert(cell, server);
            parts.extend(made);
        }
        for name in plan.clocks {
            let part = parts.get_mut(*name).with_context(|| format!("there is no {name}"))?;
            let file = folder.path().join(format!("{name}.clock"));
            fs::write(&file, "+0")?;
            for (variable, value) in [
                ("LD_PRELOAD", text(&clock_library()?)),
                ("FAKETIME_TIMESTAMP_FILE", text(&file)),
                ("FAKETIME_NO_CACHE", "1".to_owned()),
                ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
                ("DONT_FAKE_MONOTONIC", "1".to_owned()),
            ] {
                part.environment.push((variable.to_owned(), value));
            }
        }

        let bus = connect(&nats, &certificates.ca()).await?;
        let reports = Arc::new(Mutex::default());
        let listener = tokio::spawn(listen(bus.clone(), reports.clone()));
        // Whatever fails from here on, dropping this ends what was started.
        let mut cluster = Self { parts, gateways, ams, etcd, bus, reports, listener, folder };
        cluster.bring_up(plan).await.inspect_err(|_| eprintln!("the parts said:\n{}", cluster.logs()))?;
        Ok(cluster)
    }

    async fn bring_up(&mut self, plan: Plan<'_>) -> Result<()> {
        let all: Vec<String> = self.parts.keys().cloned().collect();
        let (later, first): (Vec<&String>, Vec<&String>) =
            all.iter().partition(|name| name.starts_with("gateway"));
        for name in &first {
            self.spawn(name)?;
        }
        // A gateway ends at once when its store cannot be reached.
        for name in &first {
            self.works(name).await?;
        }
        for name in &later {
            self.spawn(name)?;
        }
        for name in &later {
            self.works(name).await?;
        }
        let token = self.account().await?;
        for server in &mut self.gateways {
            *server = server.with_token(Some(&token));
        }
        let packages = self.folder.path().join("packages");
        write_applications(&packages, plan.applications)?;
        for application in plan.applications {
            let package = pack(&packages.join(application.name)).await?;
            for server in self.ams.values() {
                let answer = server.upload("/1.0/applications", package.clone()).await?.expect(202)?;
                let operation = answer.body["operation"].as_str().context("the answer names no operation")?;
                let ended = server.get(&format!("{operation}/wait?timeout=60")).await?.expect(200)?;
                ensure!(ended.metadata()["status_code"] == 200, "adding an application: {}", ended.text);
            }
        }
        for server in &self.gateways {
            until("the gateways know all cells", BOOT, || async {
                let regions = server.get("/1.0/regions").await?.expect(200)?;
                let applications = server.get("/1.0/applications").await?.expect(200)?;
                let known = self.ams.keys().all(|cell| regions.text.contains(&format!("\"{cell}\"")))
                    && plan
                        .applications
                        .iter()
                        .all(|app| applications.text.contains(&format!("\"{}\"", app.name)));
                Ok(known.then_some(()))
            })
            .await?;
        }
        Ok(())
    }

    /// Makes an account with all rights, as an operator on the machine of the first gateway would; its token.
    async fn account(&self) -> Result<String> {
        let output = Command::new("curl")
            .args([
                "-sS",
                "-H",
                "Content-Type: application/json",
                "-d",
                r#"{"name":"test"}"#,
                "--unix-socket",
            ])
            .arg(self.folder.path().join(format!("{}.sock", GATEWAYS[0])))
            .arg("http://gateway/1.0/accounts")
            .output()
            .await
            .context("running curl")?;
        let answer: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("making an account: {}", String::from_utf8_lossy(&output.stderr)))?;
        let token = answer["metadata"]["token"].as_str();
        Ok(token.with_context(|| format!("no token in {answer}"))?.to_owned())
    }

    /// A simulated cell, in a region and at a place (latitude and longitude); the gateways know it when this returns.
    ///
    /// # Errors
    /// They do not get to know it.
    pub async fn simulate(&self, id: &str, region: &str, location: [f64; 2]) -> Result<Simulated> {
        let simulated = Simulated::start(self.bus.clone(), id, region, location).await?;
        for server in &self.gateways {
            until("the gateways know a simulated cell", SOON, || async {
                let regions = server.get("/1.0/regions").await?.expect(200)?;
                Ok(regions.text.contains(&format!("\"{region}\"")).then_some(()))
            })
            .await?;
        }
        Ok(simulated)
    }

    fn part(&mut self, name: &str) -> Result<&mut Part> {
        self.parts.get_mut(name).with_context(|| format!("there is no {name}"))
    }

    /// Process id of a part.
    ///
    /// # Errors
    /// It does not run.
    pub fn pid(&self, name: &str) -> Result<i32> {
        let child = self.parts.get(name).and_then(|part| part.child.as_ref());
        let pid = child.and_then(Child::id).with_context(|| format!("{name} does not run"))?;
        Ok(pid as i32)
    }

    fn signal(&self, name: &str, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.pid(name)?).context("a process has a number")?;
        kill_process(pid, signal).with_context(|| format!("sending a signal to {name}"))
    }

    /// Kills a part at once, as `kill -9`.
    ///
    /// # Errors
    /// It does not run.
    pub async fn kill(&mut self, name: &str) -> Result<()> {
        self.signal(name, Signal::KILL)?;
        self.ended(name).await?;
        Ok(())
    }

    /// Ends a program of ours in good order, as a service manager does.
    ///
    /// # Errors
    /// It does not end, or ends with a failure.
    pub async fn terminate(&mut self, name: &str) -> Result<()> {
        self.signal(name, Signal::TERM)?;
        let status = self.ended(name).await?;
        ensure!(status.success(), "{name} ended with {status}: {}", self.log(name));
        Ok(())
    }

    /// Waits until a part has ended by itself; how.
    ///
    /// # Errors
    /// It goes on.
    pub async fn ended(&mut self, name: &str) -> Result<ExitStatus> {
        let mut child = self.part(name)?.child.take().with_context(|| format!("{name} does not run"))?;
        Ok(timeout(PATIENCE, child.wait()).await.with_context(|| format!("{name} does not end"))??)
    }

    /// Lets a part do nothing any more; its connections stay.
    ///
    /// # Errors
    /// It does not run.
    pub fn freeze(&self, name: &str) -> Result<()> {
        self.signal(name, Signal::STOP)
    }

    /// Lets a part that was frozen go on.
    ///
    /// # Errors
    /// It does not run.
    pub fn thaw(&self, name: &str) -> Result<()> {
        self.signal(name, Signal::CONT)
    }

    /// Starts a part that does not run, with the same settings and the same state, and does not wait for it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&mut self, name: &str) -> Result<()> {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join(format!("{name}.log")))?;
        let part = self.part(name)?;
        ensure!(part.child.is_none(), "{name} runs already");
        let child = Command::new(&part.program)
            .args(&part.arguments)
            .envs(part.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        part.child = Some(child);
        Ok(())
    }

    /// Waits until a part works.
    ///
    /// # Errors
    /// It ends, or does not get to work.
    pub async fn works(&mut self, name: &str) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            let part = self.part(name)?;
            let found = match &part.sign {
                Sign::Listens(address) => TcpStream::connect(address).await.map(drop).map_err(Into::into),
                Sign::Answers(server, path, sign) => server.get(path).await.and_then(|answer| {
                    ensure!(answer.status == 200 && answer.text.contains(sign), "it says {}", answer.text);
                    Ok(())
                }),
            };
            let child = part.child.as_mut().with_context(|| format!("{name} does not run"))?;
            let status = child.try_wait()?;
            match (found, status) {
                (_, Some(status)) => bail!("{name} ended with {status}: {}", self.log(name)),
                (Ok(()), None) => return Ok(()),
                (Err(error), None) if Instant::now() > end => {
                    return Err(error.context(format!("{name} does not get to work: {}", self.log(name))));
                }
                (Err(_), None) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Starts a part again and waits until it works.
    ///
    /// # Errors
    /// It does not start.
    pub async fn start_again(&mut self, name: &str) -> Result<()> {
        self.spawn(name)?;
        self.works(name).await
    }

    /// Sets the clock of a part that was started for it to so much before or after the true time: `+1h`, `-1h`, `+0`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn set_clock(&self, name: &str, offset: &str) -> Result<()> {
        let file = self.folder.path().join(format!("{name}.clock"));
        ensure!(file.exists(), "{name} was started with the clock of the machine");
        // Renamed, so that nobody reads half of it.
        let new = file.with_extension("new");
        fs::write(&new, offset)?;
        Ok(fs::rename(new, file)?)
    }

    /// The member of etcd that leads the others.
    ///
    /// # Errors
    /// There is none.
    pub async fn etcd_leader(&self) -> Result<&'static str> {
        until("etcd has a leader", SOON, || async {
            for (server, name) in self.etcd.iter().zip(ETCD) {
                let Ok(answer) = server.post("/v3/maintenance/status", json!({})).await else { continue };
                let (own, leader) = (&answer.body["header"]["member_id"], &answer.body["leader"]);
                if own.is_string() && own == leader {
                    return Ok(Some(name));
                }
            }
            Ok(None)
        })
        .await
    }

    /// Keys in the store that begin with a text, below what all keys of the gateways begin with.
    ///
    /// # Errors
    /// No member answers.
    pub async fn stored(&self, prefix: &str) -> Result<Vec<String>> {
        let first = format!("{PREFIX}{prefix}").into_bytes();
        let mut end = first.clone();
        // No byte of a text is 255.
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        let range = json!({
            "key": STANDARD.encode(&first), "range_end": STANDARD.encode(&end), "keys_only": true,
        });
        let answer = self.etcd[0].post("/v3/kv/range", range).await?.expect(200)?;
        let keys = answer.body["kvs"].as_array().into_iter().flatten();
        keys.map(|pair| {
            let key = STANDARD.decode(pair["key"].as_str().context("an entry without a key")?)?;
            Ok(String::from_utf8(key)?)
        })
        .collect()
    }

    /// What a part wrote, its last lines.
    pub fn log(&self, name: &str) -> String {
        let log = fs::read(self.folder.path().join(format!("{name}.log"))).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    fn logs(&self) -> String {
        self.parts.keys().map(|name| format!("--- {name}\n{}\n", self.log(name))).collect()
    }

    /// Asks a gateway for a session that outlives its client.
    ///
    /// # Errors
    /// No answer. A refusal is an answer.
    pub async fn ask(&self, gateway: usize, app: &str, more: Value) -> Result<Answer> {
        self.gateways[gateway].post("/1.0/sessions", wish(app, &more)).await
    }

    /// Makes a session through a gateway; its id and its websocket's address.
    ///
    /// # Errors
    /// It is refused.
    pub async fn create(&self, gateway: usize, app: &str, more: Value) -> Result<(String, String)> {
        let answer = self.ask(gateway, app, more).await?.expect(201)?;
        Ok((member_of(&answer, "id")?, member_of(&answer, "url")?))
    }

    /// Joins a session through a gateway; the websocket's address.
    ///
    /// # Errors
    /// It is refused.
    pub async fn join(&self, gateway: usize, session: &str) -> Result<String> {
        let path = format!("/1.0/sessions/{session}/join");
        let answer = self.gateways[gateway].send(Method::POST, &path, None).await?.expect(200)?;
        member_of(&answer, "url")
    }

    /// Sessions as a gateway lists them, by id.
    ///
    /// # Errors
    /// It does not.
    pub async fn sessions(&self, gateway: usize) -> Result<BTreeMap<String, Value>> {
        let answer = self.gateways[gateway].get("/1.0/sessions?recursion=true").await?.expect(200)?;
        let sessions = answer.metadata().as_array().context("no list of sessions")?;
        let id = |session: &Value| Some((session["id"].as_str()?.to_owned(), session.clone()));
        Ok(sessions.iter().filter_map(id).collect())
    }

    /// Waits until a session is active everywhere; its instance.
    ///
    /// # Errors
    /// It does not get active.
    pub async fn instance(&self, session: &str) -> Result<String> {
        let mut instance = String::new();
        for gateway in 0..self.gateways.len() {
            instance = until(&format!("session {session} is active"), BOOT, || async {
                let all = self.sessions(gateway).await?;
                let found = all.get(session).context("there is no such session")?;
                let active = found["status"] == "active";
                Ok(found["container_id"].as_str().filter(|_| active).map(str::to_owned))
            })
            .await?;
        }
        Ok(instance)
    }

    /// Sessions of the instances of a cell, as its AMS knows them, with the instance of each.
    async fn instances(&self, cell: &str) -> Result<BTreeMap<String, String>> {
        let answer = self.ams[cell].get("/1.0/instances?recursion=1").await?.expect(200)?;
        let mut all = BTreeMap::new();
        for instance in answer.metadata().as_array().context("no list of instances")? {
            let id = instance["id"].as_str().context("an instance without an id")?;
            let tags = instance["tags"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let session = tags.filter_map(|tag| tag.strip_prefix("session=")).next();
            let session = session.with_context(|| format!("no session in the tags of {instance}"))?;
            let twice = all.insert(session.to_owned(), id.to_owned());
            ensure!(twice.is_none(), "two instances have session {session}: {id} and {twice:?}");
        }
        Ok(all)
    }

    /// Instances whose keeper runs on this machine.
    fn running(&self) -> BTreeSet<String> {
        let folder = text(self.folder.path());
        let shims = processes::all()
            .into_values()
            .filter(|process| process.command.contains(" shim ") && process.command.contains(&folder));
        shims
            .filter_map(|process| process.command.trim_end_matches('/').rsplit('/').next().map(str::to_owned))
            .collect()
    }

    async fn compare(&self, simulated: &[&Simulated], kept: &BTreeSet<String>) -> Result<()> {
        let first = self.sessions(0).await?;
        let second = self.sessions(1).await?;
        ensure!(first == second, "the gateways differ: {first:#?} and {second:#?}");
        for session in first.values() {
            ensure!(session["status"] == "active", "not active: {session}");
        }
        let known: BTreeSet<String> = first.keys().cloned().collect();
        let lost: Vec<&String> = kept.difference(&known).collect();
        ensure!(lost.is_empty(), "acknowledged sessions are lost: {lost:?}");
        let mut there: BTreeSet<String> = BTreeSet::new();
        let mut instances = BTreeSet::new();
        for cell in self.ams.keys() {
            let of_cell = self.instances(cell).await?;
            instances.extend(of_cell.values().cloned());
            for (session, instance) in of_cell {
                ensure!(
                    first.get(&session).is_some_and(|known| known["container_id"] == instance.as_str()),
                    "instance {instance} of session {session} is not the one of the gateways: {:?}",
                    first.get(&session)
                );
                ensure!(there.insert(session.clone()), "session {session} has instances in two cells");
            }
        }
        let running = self.running();
        ensure!(running == instances, "AMS knows instances {instances:?}, processes run for {running:?}");
        for simulated in simulated {
            for session in simulated.sessions() {
                ensure!(there.insert(session.clone()), "session {session} has instances in two cells");
            }
        }
        ensure!(there == known, "the gateways know {known:?}, the cells have {there:?}");
        let reported: BTreeSet<String> = {
            let reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
            reports.values().flatten().cloned().collect()
        };
        ensure!(reported == known, "the gateways know {known:?}, the agents report {reported:?}");
        Ok(())
    }

    /// Waits until every view agrees: gateways, agents, AMS (with the simulated ones), and the processes that run; and
    /// all sessions are active, those to be kept among them.
    ///
    /// # Errors
    /// They do not agree in time.
    pub async fn agree(&self, simulated: &[&Simulated], kept: &BTreeSet<String>) -> Result<()> {
        until("all views agree", AGREEMENT, || async {
            self.compare(simulated, kept).await?;
            Ok(Some(()))
        })
        .await
    }

    /// Ends a session through a gateway.
    ///
    /// # Errors
    /// It is refused.
    pub async fn delete(&self, gateway: usize, session: &str) -> Result<()> {
        self.gateways[gateway].delete(&format!("/1.0/sessions/{session}")).await?.expect(200)?;
        Ok(())
    }

    /// Ends all sessions and looks for what is left of them; then ends everything.
    ///
    /// # Errors
    /// Something is left.
    pub async fn end(mut self, simulated: &[&Simulated]) -> Result<()> {
        for session in self.sessions(0).await?.into_keys() {
            self.delete(0, &session).await?;
        }
        until("nothing is left of any session", AGREEMENT, || async {
            for (number, gateway) in GATEWAYS.into_iter().enumerate() {
                let sessions = self.sessions(number).await?;
                ensure!(sessions.is_empty(), "{gateway} still lists {sessions:?}");
            }
            for cell in self.ams.keys() {
                let instances = self.instances(cell).await?;
                ensure!(instances.is_empty(), "AMS of {cell} still has {instances:?}");
                let folder = self.folder.path().join(format!("ams-{cell}/instances"));
                let left: Vec<_> =
                    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
                ensure!(left.is_empty(), "folders of instances are left: {left:?}");
            }
            let running = self.running();
            ensure!(running.is_empty(), "processes still run for {running:?}");
            for simulated in simulated {
                let sessions = simulated.sessions();
                ensure!(sessions.is_empty(), "{} still has {sessions:?}", simulated.id);
            }
            for prefix in ["sessions/", "instances/", "shares/"] {
                let keys = self.stored(prefix).await?;
                ensure!(keys.is_empty(), "keys are left in the store: {keys:?}");
            }
            Ok(Some(()))
        })
        .await?;
        let gateways = self.parts.keys().filter(|name| name.starts_with("gateway")).cloned();
        for name in gateways.collect::<Vec<_>>() {
            self.terminate(&name).await?;
        }
        until("the units have given up what they held", SOON, || async {
            let keys = [self.stored("units/").await?, self.stored("owner").await?].concat();
            ensure!(keys.is_empty(), "they still hold {keys:?}");
            Ok(Some(()))
        })
        .await?;
        for name in self.parts.keys().cloned().collect::<Vec<_>>() {
            if self.pid(&name).is_err() {
                continue;
            }
            // That they end in good order is to be shown of our own programs only.
            if NATS.contains(&name.as_str()) || ETCD.contains(&name.as_str()) {
                self.kill(&name).await?;
            } else {
                self.terminate(&name).await?;
            }
        }
        let marker = text(self.folder.path());
        until("all processes have ended", SOON, || async {
            let left = processes::with(&marker);
            if left.is_empty() { Ok(Some(())) } else { bail!("still there: {left:#?}") }
        })
        .await
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.listener.abort();
        // A test that failed half-way must not leave anything running. Nothing else has this folder in its name.
        let marker = text(self.folder.path());
        // Its folder can be removed once nobody writes there any more.
        for _ in 0..100 {
            let left = processes::with(&marker);
            if left.is_empty() {
                break;
            }
            for process in left {
                processes::kill(process.pid);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        if std::thread::panicking() || std::env::var_os("FANLIGHT_KEEP").is_some() {
            eprintln!("the parts said:\n{}", self.logs());
        }
    }
}

/// The body of a request for a session.
pub fn wish(app: &str, more: &Value) -> Value {
    let mut body = json!({
        "app": app, "joinable": true, "idle_time_min": 0,
        // Small, so that streams leave the machine time for everything else.
        "screen": { "width": 320, "height": 240, "fps": 30 },
    });
    for (name, value) in more.as_object().into_iter().flatten() {
        body[name] = value.clone();
    }
    body
}

/// A text in an answer.
///
/// # Errors
/// It is not there.
pub fn member_of(answer: &Answer, name: &str) -> Result<String> {
    let value = answer.metadata()[name].as_str();
    Ok(value.with_context(|| format!("no {name} in {}", answer.text))?.to_owned())
}

/// A connection to the bus that is made again for ever. It need not be there yet.
async fn connect(servers: &[SocketAddr], ca: &Path) -> Result<async_nats::Client> {
    let servers: Result<Vec<async_nats::ServerAddr>, _> =
        servers.iter().map(|address| format!("tls://{address}").parse()).collect();
    async_nats::ConnectOptions::new()
        .user_and_password(USER.to_owned(), PASSWORD.to_owned())
        .add_root_certificates(ca.to_owned())
        .require_tls(true)
        .retry_on_initial_connect()
        .max_reconnects(None)
        .reconnect_delay_callback(|_| Duration::from_millis(200))
        .connect(servers?)
        .await
        .context("preparing a connection to the bus")
}

/// Keeps the last whole report of each agent: its sessions that have, or get, an instance.
async fn listen(bus: async_nats::Client, reports: Arc<Mutex<BTreeMap<String, BTreeSet<String>>>>) {
    let Ok(mut messages) = bus.subscribe("sessions.report").await else { return };
    while let Some(message) = messages.next().await {
        let report: Value = serde_json::from_slice(&message.payload).unwrap_or_default();
        let (Some(agent), Some(sessions)) = (report["agent_id"].as_str(), report["sessions"].as_array())
        else {
            continue;
        };
        if report["complete"] != true {
            continue;
        }
        let there = |session: &&Value| {
            matches!(session["state"].as_str(), Some("launching" | "starting" | "running"))
        };
        let id = |session: &Value| session["session_id"].as_str().map(str::to_owned);
        let sessions = sessions.iter().filter(there).filter_map(id).collect();
        reports.lock().unwrap_or_else(PoisonError::into_inner).insert(agent.to_owned(), sessions);
    }
}
