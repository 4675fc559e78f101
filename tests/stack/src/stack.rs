//! A stack of its own for a test: the real programs, started by the `fanlight` command.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::{
    BOOT, SOON, processes,
    rest::{Answer, Server},
    until,
};

/// How long starting and ending may take.
const PATIENCE: Duration = Duration::from_secs(90);
/// The same where images are imported and applications are made in containers.
const PATIENCE_WITH_IMAGES: Duration = Duration::from_secs(300);

/// A running stack. Dropping it kills what is left; [`Stack::end`] ends it as a user would and looks for leaks.
pub struct Stack {
    folder: TempDir,
    /// Program and arguments that start it somewhere else, such as in a network namespace.
    wrapper: Vec<String>,
    options: Vec<String>,
    process: Option<Child>,
    /// The gateway, with all rights.
    pub gateway: Server,
    /// AMS, with all rights.
    pub ams: Server,
    /// What `up` wrote into its file of variables.
    pub variables: BTreeMap<String, String>,
}

/// The folder of the built programs: where the test itself was built, unless said otherwise.
///
/// # Errors
/// They are not there.
pub fn programs() -> Result<PathBuf> {
    let folder = match std::env::var_os("FANLIGHT_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let test = std::env::current_exe().context("finding the test's own program")?;
            test.ancestors().nth(2).context("the test's program has no folder")?.to_owned()
        }
    };
    for program in ["fanlight", "fanlight-streamer", "fanlight-pattern", "fanlight-probe"] {
        ensure!(
            folder.join(program).is_file(),
            "{program} is not in {}: build the workspace first",
            folder.display()
        );
    }
    Ok(folder)
}

/// An application for a test.
#[derive(Clone, Debug)]
pub struct Application {
    /// Name.
    pub name: &'static str,
    /// Program and arguments.
    pub command: Vec<String>,
}

/// An application by its command.
pub fn application<const N: usize>(name: &'static str, command: [&str; N]) -> Application {
    Application { name, command: command.map(String::from).into() }
}

/// The pattern that moves and plays a tone.
pub fn pattern() -> Application {
    application("pattern", ["fanlight-pattern", "--tone", "440"])
}

impl Stack {
    /// Starts a stack with these applications. `options` are more options of `fanlight up`.
    ///
    /// # Errors
    /// It does not start.
    pub async fn start(applications: &[Application], options: &[&str]) -> Result<Self> {
        Self::start_with(applications, options, |_| Ok(())).await
    }

    /// Starts a stack by way of a program that takes the place of nothing else, such as `nsenter -t PID -n`, with the
    /// applications in folders that the options name.
    ///
    /// # Errors
    /// It does not start.
    pub async fn start_by(wrapper: &[&str], options: &[&str]) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("fl-").tempdir().context("making a folder")?;
        let of = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        Self::begin(folder, of(wrapper), of(options)).await
    }

    /// Starts a stack after its folder was prepared; the state will be in `state` below it.
    ///
    /// # Errors
    /// The preparation fails, or the stack does not start.
    pub async fn start_with(
        applications: &[Application],
        options: &[&str],
        prepare: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("fl-").tempdir().context("making a folder")?;
        // Instances run from below it as another user.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711))?;
        prepare(folder.path())?;
        write_applications(&folder.path().join("applications"), applications)?;
        let options = options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>();
        Self::begin(folder, Vec::new(), options).await
    }

    async fn begin(folder: TempDir, wrapper: Vec<String>, options: Vec<String>) -> Result<Self> {
        let (process, variables) = launch(folder.path(), &wrapper, &options).await?;
        let (gateway, ams) = servers(&variables)?;
        Ok(Self { folder, wrapper, options, process: Some(process), gateway, ams, variables })
    }

    /// Brings more applications in while the stack runs, as packages.
    ///
    /// # Errors
    /// They cannot be packed, or are refused.
    pub async fn add(&self, applications: &[Application]) -> Result<()> {
        let folder = self.folder.path().join("added");
        write_applications(&folder, applications)?;
        for application in applications {
            let package = pack(&folder.join(application.name)).await?;
            let answer = self.ams.upload("/1.0/applications", package).await?.expect(202)?;
            self.operation(&answer).await.with_context(|| format!("adding {}", application.name))?;
            // The agent has to hear of it, and the gateway from the agent.
            until(&format!("the gateway knows {}", application.name), BOOT, || async {
                let answer = self.gateway.get("/1.0/applications").await?.expect(200)?;
                Ok(answer.text.contains(&format!("\"{}\"", application.name)).then_some(()))
            })
            .await?;
        }
        Ok(())
    }

    /// Waits for the operation that an answer of AMS names.
    ///
    /// # Errors
    /// It fails, or takes longer than a minute.
    pub async fn operation(&self, answer: &Answer) -> Result<()> {
        let operation = answer.body["operation"].as_str().context("the answer names no operation")?;
        let ended = self.ams.get(&format!("{operation}/wait?timeout=60")).await?.expect(200)?;
        ensure!(ended.metadata()["status_code"] == 200, "the operation failed: {}", ended.text);
        Ok(())
    }

    /// Runs a command of `fanlight` against this stack, such as `account list`; what it prints.
    ///
    /// # Errors
    /// It fails.
    pub async fn command(&self, words: &[&str], arguments: &[&str]) -> Result<String> {
        let output = Command::new(programs()?.join("fanlight"))
            .args(words)
            .arg("--state")
            .arg(self.state())
            .args(arguments)
            .output()
            .await
            .context("running fanlight")?;
        ensure!(output.status.success(), "fanlight {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// State folder.
    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// Folder with everything of this stack.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Process id of `fanlight up`.
    pub fn pid(&self) -> Option<i32> {
        self.process.as_ref()?.id().map(|pid| pid as i32)
    }

    /// Kills `fanlight up` alone, at once.
    ///
    /// # Errors
    /// It does not run.
    pub async fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the stack does not run")?;
        process.start_kill()?;
        process.wait().await?;
        Ok(())
    }

    /// Starts the stack again, with the same state.
    ///
    /// # Errors
    /// It does not start.
    pub async fn start_again(&mut self) -> Result<()> {
        let (process, variables) = launch(self.folder.path(), &self.wrapper, &self.options).await?;
        (self.gateway, self.ams) = servers(&variables)?;
        self.process = Some(process);
        self.variables = variables;
        Ok(())
    }

    /// Interrupts `fanlight up` as Ctrl-C does and waits for its end.
    ///
    /// # Errors
    /// It does not end, or ends with a failure.
    pub async fn interrupt(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the stack does not run")?;
        let pid = process.id().context("the stack ended by itself")?;
        if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
            rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
        }
        let status =
            tokio::time::timeout(PATIENCE, process.wait()).await.context("the stack did not end")??;
        ensure!(status.success(), "the stack ended with {status}: {}", self.log());
        Ok(())
    }

    /// Ends the stack as a user would; nothing of it may be left.
    ///
    /// # Errors
    /// It does not end, or leaves something behind.
    pub async fn end(mut self) -> Result<()> {
        self.interrupt().await?;
        self.nothing_is_left().await
    }

    /// Checks that no process and no instance of this stack is there any more.
    ///
    /// # Errors
    /// Something is.
    pub async fn nothing_is_left(&self) -> Result<()> {
        let marker = self.folder.path().display().to_string();
        until("all processes have ended", SOON, || async {
            let left = processes::with(&marker);
            if left.is_empty() { Ok(Some(())) } else { bail!("still there: {left:#?}") }
        })
        .await?;
        let instances = self.state().join("ams/instances");
        let left: Vec<_> =
            fs::read_dir(&instances).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        ensure!(left.is_empty(), "folders of instances are left: {left:?}");
        Ok(())
    }

    /// What `up` wrote.
    pub fn log(&self) -> String {
        let read = |name| fs::read_to_string(self.folder.path().join(name)).unwrap_or_default();
        format!("{}\n{}", read("stdout"), read("stderr"))
    }

    /// Creates a session; its id and its websocket's address.
    ///
    /// # Errors
    /// It is refused.
    pub async fn create(&self, app: &str, more: Value) -> Result<(String, String)> {
        let mut body = json!({ "app": app, "joinable": true, "idle_time_min": 10 });
        for (name, value) in more.as_object().into_iter().flatten() {
            body[name] = value.clone();
        }
        let answer = self.gateway.post("/1.0/sessions", body).await?.expect(201)?;
        let text = |name: &str| {
            answer.metadata()[name]
                .as_str()
                .map(str::to_owned)
                .with_context(|| format!("no {name} in {}", answer.text))
        };
        Ok((text("id")?, text("url")?))
    }

    /// Joins a session; the websocket's address.
    ///
    /// # Errors
    /// It is refused.
    pub async fn join(&self, session: &str) -> Result<String> {
        let answer = self
            .gateway
            .send(Method::POST, &format!("/1.0/sessions/{session}/join"), None)
            .await?
            .expect(200)?;
        answer.metadata()["url"]
            .as_str()
            .map(str::to_owned)
            .with_context(|| format!("no url in {}", answer.text))
    }

    /// Waits until a session has a status; the session.
    ///
    /// # Errors
    /// It gets none, or another that is final.
    pub async fn session_is(&self, session: &str, status: &str, patience: Duration) -> Result<Value> {
        until(&format!("session {session} is {status}"), patience, || async {
            let answer = self.gateway.get(&format!("/1.0/sessions/{session}")).await?.expect(200)?;
            if answer.metadata()["status"] == status {
                Ok(Some(answer.metadata().clone()))
            } else {
                bail!("it is {}", answer.text)
            }
        })
        .await
    }

    /// Waits until a session is gone.
    ///
    /// # Errors
    /// It stays.
    pub async fn session_is_gone(&self, session: &str) -> Result<()> {
        until(&format!("session {session} is gone"), BOOT, || async {
            let answer = self.gateway.get(&format!("/1.0/sessions/{session}")).await?;
            if answer.status == 404 { Ok(Some(())) } else { bail!("there is {}", answer.text) }
        })
        .await
    }

    /// Id of the instance of a session that is active.
    ///
    /// # Errors
    /// It does not get active.
    pub async fn instance(&self, session: &str) -> Result<String> {
        let found = self.session_is(session, "active", BOOT).await?;
        found["container_id"].as_str().map(str::to_owned).context("the session names no instance")
    }

    /// Waits until AMS has no instance.
    ///
    /// # Errors
    /// Some stay.
    pub async fn no_instances(&self) -> Result<()> {
        until("AMS has no instances", BOOT, || async {
            let answer = self.ams.get("/1.0/instances").await?.expect(200)?;
            if answer.metadata() == &json!([]) { Ok(Some(())) } else { bail!("there is {}", answer.text) }
        })
        .await
    }

    /// The processes of an instance.
    pub fn processes_of(&self, instance: &str) -> Vec<processes::Process> {
        processes::with(instance)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // A test that failed half-way must not leave its stack running. Nothing else has this folder in its name.
        for process in processes::with(&self.folder.path().display().to_string()) {
            processes::kill(process.pid);
        }
        if std::thread::panicking() || std::env::var_os("FANLIGHT_KEEP").is_some() {
            eprintln!("the stack said:\n{}", self.log());
        }
    }
}

fn servers(variables: &BTreeMap<String, String>) -> Result<(Server, Server)> {
    let value = |name: &str| {
        variables.get(name).map(String::as_str).with_context(|| format!("{name} was not written"))
    };
    let authority = Path::new(value("FANLIGHT_CA")?);
    let gateway =
        Server::new(value("FANLIGHT_GATEWAY_URL")?, authority, Some(value("FANLIGHT_TOKEN")?), None)?;
    let identity = (Path::new(value("FANLIGHT_AMS_CERT")?), Path::new(value("FANLIGHT_AMS_KEY")?));
    let ams = Server::new(value("FANLIGHT_AMS_URL")?, authority, None, Some(identity))?;
    Ok((gateway, ams))
}

/// Starts `fanlight up` and waits until it is ready.
async fn launch(
    folder: &Path,
    wrapper: &[String],
    options: &[String],
) -> Result<(Child, BTreeMap<String, String>)> {
    let variables = folder.join("variables");
    match fs::remove_file(&variables) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).context("removing old variables");
        }
        _ => {}
    }
    let output = |name| fs::File::options().create(true).append(true).open(folder.join(name));
    let program = programs()?.join("fanlight");
    let mut command = match wrapper {
        [] => Command::new(program),
        [first, rest @ ..] => {
            let mut command = Command::new(first);
            command.args(rest).arg(program);
            command
        }
    };
    let with_images = options.iter().any(|option| option == "--image");
    let patience = if with_images { PATIENCE_WITH_IMAGES } else { PATIENCE };
    let applications = folder.join("applications");
    if applications.is_dir() {
        command.arg("up").arg("--applications").arg(applications);
    } else {
        command.arg("up");
    }
    let mut process = command
        .args(["--ports", "auto", "--state"])
        .arg(folder.join("state"))
        .arg("--env-file")
        .arg(&variables)
        .args(options)
        .stdin(Stdio::null())
        .stdout(output("stdout")?)
        .stderr(output("stderr")?)
        // Ctrl-C in a terminal must not reach it: the test ends it.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .context("starting fanlight up")?;
    let ready = until("fanlight up is ready", patience, || {
        let ended = process.try_wait();
        let path = variables.clone();
        async move {
            if let Some(status) = ended? {
                return Ok(Some(Err(status)));
            }
            // It is written in one go when everything answers.
            Ok(fs::read_to_string(path).ok().filter(|text| text.contains("FANLIGHT_PAGE_URL")).map(Ok))
        }
    })
    .await;
    let said = || fs::read_to_string(folder.join("stderr")).unwrap_or_default();
    match ready {
        Ok(Ok(text)) => Ok((process, parse(&text))),
        Ok(Err(status)) => bail!("fanlight up ended with {status}: {}", said()),
        Err(error) => Err(error.context(said())),
    }
}

fn parse(text: &str) -> BTreeMap<String, String> {
    let line = |line: &str| {
        let (name, value) = line.split_once('=')?;
        Some((name.to_owned(), value.trim_matches('\'').replace("'\\''", "'")))
    };
    text.lines().filter_map(line).collect()
}

/// Writes the applications, each with the programs of ours that it needs: an instance sees its package and nothing
/// else of this machine's folders.
pub(crate) fn write_applications(folder: &Path, applications: &[Application]) -> Result<()> {
    let programs = programs()?;
    for application in applications {
        let own = folder.join(application.name);
        fs::create_dir_all(own.join("bin"))?;
        let manifest = json!({
            "name": application.name,
            "command": application.command,
            "resources": { "cpus": 1, "memory": "256MB", "disk-size": "512MB" },
        });
        // JSON is YAML.
        fs::write(own.join("manifest.yaml"), manifest.to_string())?;
        for program in ["fanlight-pattern", "fanlight-scene", "fanlight-probe"] {
            if application.command.iter().any(|word| word.contains(program)) {
                fs::copy(programs.join(program), own.join("bin").join(program))
                    .with_context(|| format!("copying {program}"))?;
            }
        }
    }
    Ok(())
}

/// The package of an application that was written into this folder.
pub(crate) async fn pack(folder: &Path) -> Result<Vec<u8>> {
    let packed = Command::new("tar")
        .arg("-C")
        .arg(folder)
        .args(["-cz", "manifest.yaml", "bin"])
        .output()
        .await
        .context("running tar")?;
    ensure!(packed.status.success(), "tar: {}", String::from_utf8_lossy(&packed.stderr));
    Ok(packed.stdout)
}
