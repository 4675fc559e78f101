//! `fanlight launch`, `init`, `copy`, `ls`, `show`, `wait`, `start`, `stop`, `restart`, `delete` and `set`.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use fanlight_api::{
    ApplicationId,
    ams::{
        Display, InstanceConfig, InstanceStatus, InstancesPost, Operation, ResourcesPost, Security, Source,
    },
};
use fanlight_client::AmsClient;
use serde_json::Value;

use super::{
    cli::{
        Change, Condition, CopyInstance, DeleteInstances, FilteredList, Format, Launch, Patience, Set,
        ShowInstance, WaitFor,
    },
    failure::{NotFound, Usage},
    output::{self, Column, cell, confirm, count},
    progress::{Line, finish, follow},
    remotes::client,
};

const INSTANCES: &str = "/1.0/instances";
/// How often an instance is looked at while its status is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// The platform that draws, as the original's client names it for `--enable-graphics`.
const GRAPHICS: &str = "webrtc";

/// `fanlight launch`
///
/// # Errors
/// The launch is refused, fails, or goes on beyond the time.
pub async fn launch(options: Launch) -> Result<()> {
    make(options, true).await
}

/// `fanlight init`
///
/// # Errors
/// As of [`launch`].
pub async fn init(options: Launch) -> Result<()> {
    make(options, false).await
}

async fn make(options: Launch, start: bool) -> Result<()> {
    let request = request(&options, start)?;
    let ams = client(&options.target)?;
    let doing = if start { "launching the instance" } else { "making the instance" };
    tell(&ams, &request, doing, &options.patience, options.output.format).await
}

/// `fanlight copy`
///
/// # Errors
/// The source runs, and is not to be stopped; or as the server says.
pub async fn copy(options: CopyInstance) -> Result<()> {
    let ams = client(&options.target)?;
    let source = ams.instance(&options.instance).await.context("looking at the source")?;
    if !matches!(source.status(), InstanceStatus::Stopped | InstanceStatus::Error) {
        if !options.force {
            return Err(Usage(format!(
                "{} is {}: stop it first, or let --force stop it",
                options.instance, source.status
            ))
            .into());
        }
        let stop = ams.stop_instance(source.id.as_str(), false).await.context("stopping the source")?;
        finish(&ams, &stop, "stopping the source", options.patience.timeout).await?;
    }
    let request = InstancesPost {
        name: options.name.unwrap_or_default(),
        node: options.node.unwrap_or_default(),
        tags: options.tags,
        source: Some(Source { kind: "instance".into(), id: source.id.to_string() }),
        no_start: !options.launch,
        ..InstancesPost::default()
    };
    tell(&ams, &request, "copying the instance", &options.patience, options.output.format).await
}

/// Has an instance made, and prints which.
async fn tell(
    ams: &AmsClient,
    request: &InstancesPost,
    doing: &str,
    patience: &Patience,
    format: Format,
) -> Result<()> {
    let operation = ams.launch(request, patience.no_wait, None).await.with_context(|| doing.to_owned())?;
    let id = operation.resource("instances").map(str::to_owned);
    let id = id.context("the server took the launch, but names no instance")?;
    if format == Format::Table {
        // At once, so that a launch which fails can be looked into.
        output::print(&format!("{id}\n"))?;
    }
    if !patience.no_wait {
        let done = finish(ams, &operation, doing, patience.timeout).await;
        done.with_context(|| format!("instance {id} (`fanlight show {id}`, `fanlight logs {id}`)"))?;
    }
    if format != Format::Table {
        let instance = ams.object(INSTANCES, &id).await.context("showing the instance")?;
        output::object(format, &instance)?;
    }
    Ok(())
}

/// What the options ask for.
fn request(options: &Launch, start: bool) -> Result<InstancesPost> {
    let user_data = match &options.userdata_path {
        Some(file) => {
            Some(std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?)
        }
        None => options.userdata.clone(),
    };
    let (width, height) = options.display_size.unwrap_or_default();
    let platform = if options.enable_graphics { Some(GRAPHICS.to_owned()) } else { options.platform.clone() };
    Ok(InstancesPost {
        name: options.name.clone().unwrap_or_default(),
        app_id: options.application.clone().unwrap_or_default(),
        app_version: options.app_version,
        image_id: options.image.clone().unwrap_or_default(),
        image_version: options.image_version,
        node: options.node.clone().unwrap_or_default(),
        user_data,
        addons: options.addons.clone(),
        services: options.services.clone(),
        resources: ResourcesPost {
            cpus: options.cpus,
            memory: options.memory,
            disk_size: options.disk_size,
            gpu_slots: options.gpu_slots,
            gpu_type: options.gpu_type.clone().unwrap_or_default(),
            ..ResourcesPost::default()
        },
        tags: options.tags.clone(),
        config: InstanceConfig {
            platform: platform.unwrap_or_default(),
            disable_watchdog: options.disable_watchdog,
            devmode: options.devmode,
            enable_streaming: options.enable_streaming,
            features: options.features.clone().unwrap_or_default(),
            display: Display {
                width,
                height,
                fps: options.fps.unwrap_or_default(),
                density: options.display_density.unwrap_or_default(),
            },
            security: Security { delete_protected: options.delete_protected },
            ..InstanceConfig::default()
        },
        no_start: !start,
        ..InstancesPost::default()
    })
}

/// `fanlight ls`
///
/// # Errors
/// A filter is not known; or as the server says.
pub async fn list(options: FilteredList) -> Result<()> {
    let filters =
        options.filters.iter().map(|(key, value)| filter(key, value)).collect::<Result<Vec<_>>>()?;
    let ams = client(&options.list.target)?;
    let instances = ams.objects(INSTANCES, &filters).await.context("listing the instances")?;
    let columns: Vec<Column> = match instances.iter().any(|instance| !instance["pool"].is_null()) {
        true => COLUMNS.iter().flat_map(|column| [Some(*column), pool_after(column)]).flatten().collect(),
        false => COLUMNS.to_vec(),
    };
    output::list(options.list.output.format, &instances, &columns)
}

/// Where an instance of a pool stands, beside its status: nobody launched those that wait.
fn pool_after((title, _): &Column) -> Option<Column> {
    (*title == "STATUS").then_some(("POOL", |instance| cell(instance, "/pool")))
}

const COLUMNS: &[Column] = &[
    ("ID", |instance| cell(instance, "/id")),
    ("NAME", |instance| cell(instance, "/name")),
    ("APPLICATION", |instance| match cell(instance, "/app_name") {
        name if name.is_empty() => cell(instance, "/image_name"),
        name => name,
    }),
    ("STATUS", |instance| cell(instance, "/status")),
    ("NODE", |instance| cell(instance, "/node")),
    ("ADDRESS", |instance| cell(instance, "/address")),
    ("TAGS", |instance| cell(instance, "/tags")),
    ("MESSAGE", |instance| match cell(instance, "/error_message") {
        error if error.is_empty() => cell(instance, "/status_message"),
        error => error,
    }),
];

/// A filter as the server has it: names of the original's command line are not those of its API (ams-api section 15).
fn filter(key: &str, value: &str) -> Result<(&'static str, String)> {
    const KNOWN: [&str; 12] = [
        "id",
        "name",
        "base",
        "type",
        "status",
        "node",
        "app_id",
        "app_name",
        "app_version",
        "image_id",
        "image_version",
        "tags",
    ];
    Ok(match (key, value) {
        ("app", value) if value.parse::<ApplicationId>().is_ok() && value.len() == 20 => {
            ("app_id", value.into())
        }
        ("app", value) => ("app_name", value.into()),
        ("tag", value) => ("tags", value.into()),
        ("type", "regular") => ("base", "false".into()),
        ("type", "base") => ("base", "true".into()),
        ("vm", "true") => ("type", "vm".into()),
        ("vm", "false") => ("type", "container".into()),
        (key, value) => match KNOWN.iter().find(|known| **known == key) {
            Some(known) => (*known, value.into()),
            None => {
                let text = format!(
                    "instances cannot be filtered by {key:?}; known are app, tag, vm, {}",
                    KNOWN.join(", ")
                );
                return Err(Usage(text).into());
            }
        },
    })
}

/// `fanlight show`
///
/// # Errors
/// As the server says.
pub async fn show(options: ShowInstance) -> Result<()> {
    let ams = client(&options.target)?;
    let instance = ams.object(INSTANCES, &options.instance).await.context("showing the instance")?;
    output::object(options.output.format, &instance)
}

/// `fanlight wait`
///
/// # Errors
/// The instance never gets there, or not in time.
pub async fn wait(options: WaitFor) -> Result<()> {
    let ams = client(&options.target)?;
    until(&ams, &options.instance, options.condition, options.timeout).await
}

async fn until(ams: &AmsClient, name: &str, condition: Condition, timeout: Duration) -> Result<()> {
    let end = Instant::now() + timeout;
    let mut line = Line::new();
    loop {
        let now = match ams.instance(name).await {
            Ok(instance) => Some(instance),
            Err(error) if error.is_not_found() => None,
            // A server that is away for a moment is waited for as well.
            Err(error) if error.is_transient() && Instant::now() < end => {
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            }
            Err(error) => return Err(error).context("looking at the instance"),
        };
        let status = now.as_ref().map(|instance| instance.status());
        match judge(condition, status) {
            Judgement::Met => return Ok(()),
            Judgement::Never => {
                drop(line);
                let Some(instance) = now else {
                    return Err(NotFound(format!("there is no instance {name:?}")).into());
                };
                let why = if instance.error_message.is_empty() {
                    String::new()
                } else {
                    format!(": {}", instance.error_message)
                };
                bail!("the instance is {}{why} and does not get there by itself", instance.status().as_str());
            }
            Judgement::NotYet => {}
        }
        if Instant::now() >= end {
            drop(line);
            bail!(
                "not within {}: the instance is {}; --timeout waits longer",
                humantime::format_duration(timeout),
                status.map_or("not there", InstanceStatus::as_str)
            );
        }
        let message = now.map(|instance| instance.status_message).unwrap_or_default();
        line.say(&format!(
            "waiting for {name}: {} {message}",
            status.map_or("not there", InstanceStatus::as_str)
        ));
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Judgement {
    Met,
    NotYet,
    /// Not without somebody doing something.
    Never,
}

/// Whether a status is what is waited for; no status: there is no instance.
fn judge(condition: Condition, status: Option<InstanceStatus>) -> Judgement {
    use InstanceStatus as S;
    let reached =
        |least: S| status.is_some_and(|now| (least.code()..=S::Running.code()).contains(&now.code()));
    let met = match condition {
        Condition::Exists => status.is_some(),
        Condition::Deleted => status.is_none(),
        Condition::Prepared => reached(S::Prepared),
        Condition::Started => reached(S::Started),
        Condition::Running => reached(S::Running),
        Condition::Stopped => status == Some(S::Stopped),
        Condition::Error => status == Some(S::Error),
    };
    if met {
        return Judgement::Met;
    }
    match (condition, status) {
        // Somebody may be about to make it, or to delete it.
        (Condition::Exists | Condition::Deleted, _) => Judgement::NotYet,
        (_, None | Some(S::Deleted | S::Error)) => Judgement::Never,
        (Condition::Prepared | Condition::Started | Condition::Running, Some(S::Stopped)) => Judgement::Never,
        _ => Judgement::NotYet,
    }
}

/// `fanlight start`
///
/// # Errors
/// As the server says of any of them.
pub async fn start(options: Change) -> Result<()> {
    let ams = client(&options.target)?;
    let no_wait = options.patience.no_wait;
    each(&ams, &options.instances, "starting", &options.patience, async |name| {
        Ok(Some(ams.start_instance(name, no_wait).await?))
    })
    .await
}

/// `fanlight stop`
///
/// # Errors
/// As the server says of any of them.
pub async fn stop(options: Change) -> Result<()> {
    let ams = client(&options.target)?;
    let no_wait = options.patience.no_wait;
    each(&ams, &options.instances, "stopping", &options.patience, async |name| {
        Ok(Some(ams.stop_instance(name, no_wait).await?))
    })
    .await
}

/// `fanlight restart`: stops and starts; an instance that is stopped stays so, as in the original.
///
/// # Errors
/// As the server says of any of them.
pub async fn restart(options: Change) -> Result<()> {
    let ams = client(&options.target)?;
    each(&ams, &options.instances, "starting again", &options.patience, async |name| {
        if ams.instance(name).await?.status() == InstanceStatus::Stopped {
            output::note(&format!("{name} is stopped and stays so; `fanlight start {name}` starts it"));
            return Ok(None);
        }
        let stopped = ams.stop_instance(name, false).await?;
        finish(&ams, &stopped, &format!("stopping {name}"), options.patience.timeout).await?;
        Ok(Some(ams.start_instance(name, options.patience.no_wait).await?))
    })
    .await
}

/// Does something to each instance, all of them even if some fail, then waits for all.
async fn each(
    ams: &AmsClient,
    names: &[String],
    doing: &str,
    patience: &Patience,
    mut act: impl AsyncFnMut(&str) -> Result<Option<Operation>>,
) -> Result<()> {
    let mut failures: Vec<anyhow::Error> = Vec::new();
    let mut begun = Vec::new();
    for name in names {
        let doing = format!("{doing} {name}");
        match act(name).await.with_context(|| doing.clone()) {
            Ok(Some(operation)) => begun.push((doing, operation)),
            Ok(None) => {}
            Err(error) => failures.push(error),
        }
    }
    for (doing, operation) in begun {
        if let Err(error) = follow(ams, &operation, &doing, patience).await {
            failures.push(error);
        }
    }
    let Some(last) = failures.pop() else { return Ok(()) };
    for error in failures {
        output::note(&super::report(&error));
    }
    Err(last)
}

/// `fanlight delete`
///
/// # Errors
/// As the server says of any of them.
pub async fn delete(options: DeleteInstances) -> Result<()> {
    let ams = client(&options.target)?;
    if !options.all {
        return each(&ams, &options.instances, "deleting", &options.patience, async |name| {
            Ok(Some(ams.delete_instance(name, options.force).await?))
        })
        .await;
    }
    let instances = ams.objects(INSTANCES, &[]).await.context("listing the instances")?;
    let protected =
        |instance: &&Value| instance.pointer("/config/security/delete_protected") == Some(&Value::Bool(true));
    let kept = instances.iter().filter(protected).count();
    let ids: Vec<String> = instances
        .iter()
        .filter(|instance| !protected(instance))
        .map(|instance| cell(instance, "/id"))
        .collect();
    if kept > 0 {
        output::note(&format!("{} protected against deletion and left alone", count(kept, "instance")));
    }
    if ids.is_empty() {
        output::note("there is nothing to delete");
        return Ok(());
    }
    confirm(&format!("Delete {} of {}?", count(ids.len(), "instance"), ams.endpoint().name()), options.yes)?;
    let doing = format!("deleting {}", count(ids.len(), "instance"));
    let operation = ams.delete_instances(ids, options.force).await.with_context(|| doing.clone())?;
    follow(&ams, &operation, &doing, &options.patience).await
}

/// `fanlight set`
///
/// # Errors
/// As the server says.
pub async fn set(options: Set) -> Result<()> {
    let ams = client(&options.target)?;
    let doing = format!("changing {}", options.instance);
    // The one setting there is; the parser of the command line lets no other through.
    let operation =
        ams.protect_instance(&options.instance, options.value).await.with_context(|| doing.clone())?;
    follow(&ams, &operation, &doing, &options.patience).await
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::{Cli, Command};

    fn parse(words: &[&str]) -> InstancesPost {
        let words = ["fanlight", "launch"].iter().chain(words);
        let Command::Launch(options) = Cli::try_parse_from(words).expect("valid").command else {
            panic!("another command");
        };
        request(&options, true).expect("valid")
    }

    #[test]
    fn options_of_a_launch_become_the_request() {
        let request = parse(&[
            "game",
            "--name",
            "one",
            "--memory",
            "3GB",
            "--display-size",
            "640x480",
            "--fps",
            "30",
            "--tag",
            "a",
            "--tag",
            "b",
            "--service",
            "+web:tcp:80",
            "--enable-graphics",
            "--delete-protected",
            "--userdata",
            "x",
        ]);
        assert_eq!((request.app_id.as_str(), request.name.as_str()), ("game", "one"));
        assert_eq!(request.resources.memory, Some(3_000_000_000));
        assert_eq!(request.config.display, Display { width: 640, height: 480, fps: 30, density: 0 });
        assert_eq!(request.tags, ["a", "b"]);
        assert_eq!(request.services[0].port, 80);
        assert_eq!(request.config.platform, "webrtc");
        assert!(
            request.config.security.delete_protected && !request.no_start && !request.config.enable_streaming
        );
        assert_eq!(request.user_data.as_deref(), Some("x"));
        let request = parse(&["--image", "base", "--addon", "ssh"]);
        assert_eq!((request.app_id.as_str(), request.image_id.as_str()), ("", "base"));
        assert_eq!(request.resources, ResourcesPost::default());
    }

    #[test]
    fn launches_that_make_no_sense_are_refused_before_anybody_is_asked() {
        for words in [
            &[][..],
            &["game", "--image", "base"],
            &["game", "--addon", "x"],
            &["game", "--memory", "lots"],
            &["game", "--display-size", "0x0"],
            &["game", "--userdata", "x", "--userdata-path", "y"],
        ] {
            let words = ["fanlight", "launch"].iter().chain(words);
            let error = Cli::try_parse_from(words.clone()).expect_err("refused");
            assert_eq!(error.exit_code(), i32::from(super::super::failure::USAGE), "{error}");
        }
    }

    #[test]
    fn filters_of_the_original_become_those_of_its_api() {
        for (key, value, expected) in [
            ("app", "game", ("app_name", "game")),
            ("app", "cilsreunfpfec9b1ktg0", ("app_id", "cilsreunfpfec9b1ktg0")),
            ("tag", "a,b", ("tags", "a,b")),
            ("type", "base", ("base", "true")),
            ("type", "regular", ("base", "false")),
            ("vm", "true", ("type", "vm")),
            ("status", "running", ("status", "running")),
        ] {
            let (name, text) = filter(key, value).expect(key);
            assert_eq!((name, text.as_str()), expected);
        }
        let error = filter("colour", "red").expect_err("unknown");
        assert!(error.is::<Usage>() && error.to_string().contains("colour"), "{error}");
    }

    #[test]
    fn waiting_ends_when_the_state_is_reached_or_never_will_be() {
        use InstanceStatus as S;
        for (condition, status, expected) in [
            (Condition::Running, Some(S::Created), Judgement::NotYet),
            (Condition::Running, Some(S::Running), Judgement::Met),
            (Condition::Running, Some(S::Error), Judgement::Never),
            (Condition::Running, Some(S::Stopped), Judgement::Never),
            (Condition::Running, None, Judgement::Never),
            (Condition::Prepared, Some(S::Running), Judgement::Met),
            (Condition::Stopped, Some(S::Running), Judgement::NotYet),
            (Condition::Stopped, Some(S::Error), Judgement::Never),
            (Condition::Error, Some(S::Error), Judgement::Met),
            (Condition::Exists, None, Judgement::NotYet),
            (Condition::Exists, Some(S::Created), Judgement::Met),
            (Condition::Deleted, Some(S::Running), Judgement::NotYet),
            (Condition::Deleted, None, Judgement::Met),
        ] {
            assert_eq!(judge(condition, status), expected, "{condition:?} {status:?}");
        }
    }
}
