use std::collections::BTreeMap;

use fanlight_api::{agent_link::ClientStatus, gateway::Screen};

use super::*;

fn id(text: &str) -> SessionId {
    text.parse().expect("valid")
}

fn launch(session: &str, attempt: u32) -> Launch {
    Launch {
        session_id: id(session),
        attempt,
        app: "terminal".into(),
        app_version: None,
        screen: Screen::default(),
        joinable: true,
        ephemeral: true,
        idle_time_min: 0,
        extra_data: serde_json::Value::Null,
    }
}

fn instance(instance: &str, session: &str, status: InstanceStatus, ours: bool) -> Instance {
    let mut tags = vec![format!("session={session}")];
    if ours {
        tags.push(LAUNCHED_TAG.into());
    }
    serde_json::from_value(serde_json::json!({
        "id": instance, "name": instance, "type": "container", "tags": tags,
        "status_code": status.code(), "status": status.as_str(),
        "error_message": if status == InstanceStatus::Error { "it broke" } else { "" },
    }))
    .expect("valid")
}

/// A core with a clock that its test moves.
struct World {
    sessions: Sessions,
    now: Instant,
}

impl World {
    fn new() -> Self {
        Self { sessions: Sessions::default(), now: Instant::now() }
    }

    fn pass(&mut self, seconds: u64) -> Vec<Work> {
        let mut work = Vec::new();
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            work.extend(self.sessions.tick(self.now));
        }
        work
    }

    /// A list that is begun and read now.
    fn sync(&mut self, instances: &[Instance]) -> Vec<Work> {
        self.now += Duration::from_millis(1);
        let begun = self.now;
        self.now += Duration::from_millis(1);
        self.sessions.synced(self.now, begun, instances)
    }

    fn states(&mut self) -> BTreeMap<String, InstanceState> {
        let reports = self.sessions.report_all();
        reports.into_iter().map(|report| (report.session_id.to_string(), report.state)).collect()
    }

    fn state(&mut self, session: &str) -> Option<InstanceState> {
        self.states().remove(session)
    }
}

fn delete(instance: &str, session: &str, force: bool) -> Work {
    Work::Delete { instance_id: instance.parse().expect("valid"), session_id: id(session), force }
}

#[test]
fn a_session_goes_from_accepted_to_running_and_is_deleted_when_the_gateway_says_so() {
    let mut world = World::new();
    let work = world.sessions.accept(world.now, &launch("s1", 1)).expect("accepted");
    assert!(matches!(&work[..], [Work::Launch(_)]));
    assert_eq!(world.state("s1"), Some(InstanceState::Launching));
    assert!(world.sessions.wants_launch(&id("s1"), 1));
    world.sync(&[]);
    assert_eq!(world.state("s1"), Some(InstanceState::Launching), "a list before the launch says nothing");
    world.sessions.launched(world.now, &id("s1"), 1, Ok("i1".parse().expect("valid")));
    assert_eq!(world.state("s1"), Some(InstanceState::Starting));
    for (status, state) in [
        (InstanceStatus::Created, InstanceState::Starting),
        (InstanceStatus::Started, InstanceState::Starting),
        (InstanceStatus::Running, InstanceState::Running),
    ] {
        assert_eq!(world.sync(&[instance("i1", "s1", status, true)]), []);
        assert_eq!(world.state("s1"), Some(state));
    }
    let (state, work) = world.sessions.end(world.now, &id("s1"), "bye", false);
    assert_eq!(state, InstanceState::Ending);
    assert_eq!(work, [delete("i1", "s1", false), Work::ReadAms]);
    let (_, work) = world.sessions.end(world.now, &id("s1"), "bye", false);
    assert_eq!(work, [Work::ReadAms], "asked again at once, not deleted again");
    assert_eq!(world.pass(6), [delete("i1", "s1", false)], "a lost deletion is repeated");
    world.sync(&[]);
    assert_eq!(world.state("s1"), Some(InstanceState::Gone));
    assert_eq!(world.sessions.end(world.now, &id("s1"), "bye", false), (InstanceState::Gone, vec![]));
    world.pass(40);
    assert_eq!(world.states(), BTreeMap::new(), "forgotten");
    assert!(world.sessions.accept(world.now, &launch("s1", 2)).is_err(), "a late launch makes nothing");
}

#[test]
fn the_same_launch_again_makes_nothing_and_a_newer_attempt_does() {
    let mut world = World::new();
    assert_eq!(world.sessions.accept(world.now, &launch("s1", 2)).expect("accepted").len(), 1);
    for attempt in [2, 1, 2] {
        assert_eq!(world.sessions.accept(world.now, &launch("s1", attempt)), Ok(vec![]));
    }
    let failure = LaunchFailure { text: "no suitable node".into(), certain: true };
    world.sessions.launched(world.now, &id("s1"), 1, Err(failure.clone()));
    assert_eq!(world.state("s1"), Some(InstanceState::Launching), "news of an older attempt do not count");
    world.sessions.launched(world.now, &id("s1"), 2, Err(failure));
    world.sync(&[]);
    let report = world.sessions.report_all().remove(0);
    assert_eq!((report.state, report.message.as_deref()), (InstanceState::Failed, Some("no suitable node")));
    assert_eq!(world.sessions.accept(world.now, &launch("s1", 2)), Ok(vec![]), "failed is failed");
    assert_eq!(world.sessions.accept(world.now, &launch("s1", 3)).expect("accepted").len(), 1);
    assert_eq!(world.state("s1"), Some(InstanceState::Launching));
}

#[test]
fn a_list_that_was_begun_before_the_launch_was_answered_does_not_make_it_gone() {
    let mut world = World::new();
    world.sessions.accept(world.now, &launch("s1", 1)).expect("accepted");
    let begun = world.now;
    world.now += Duration::from_millis(10);
    world.sessions.launched(world.now, &id("s1"), 1, Ok("i1".parse().expect("valid")));
    world.sessions.synced(world.now, begun, &[]);
    assert_eq!(world.state("s1"), Some(InstanceState::Starting));
    world.sync(&[]);
    assert_eq!(world.state("s1"), Some(InstanceState::Gone), "a later one does");
}

#[test]
fn an_end_during_the_launch_removes_what_the_launch_made() {
    let mut world = World::new();
    world.sessions.accept(world.now, &launch("s1", 1)).expect("accepted");
    let (state, work) = world.sessions.end(world.now, &id("s1"), "bye", true);
    assert_eq!((state, work), (InstanceState::Ending, vec![Work::ReadAms]));
    assert!(!world.sessions.wants_launch(&id("s1"), 1), "not tried again");
    world.sync(&[]);
    assert_eq!(world.state("s1"), Some(InstanceState::Ending), "the launch is still on its way");
    let work = world.sessions.launched(world.now, &id("s1"), 1, Ok("i1".parse().expect("valid")));
    assert_eq!(work, [delete("i1", "s1", true), Work::ReadAms]);
    world.sync(&[]);
    assert_eq!(world.state("s1"), Some(InstanceState::Gone));
}

#[test]
fn an_instance_that_appears_after_its_session_ended_is_removed() {
    let mut world = World::new();
    world.sessions.accept(world.now, &launch("s1", 1)).expect("accepted");
    world.sessions.end(world.now, &id("s1"), "bye", false);
    let unknown = LaunchFailure { text: "no answer".into(), certain: false };
    world.sessions.launched(world.now, &id("s1"), 1, Err(unknown));
    assert_eq!(world.state("s1"), Some(InstanceState::Ending), "nobody knows yet");
    world.sync(&[]);
    assert_eq!(world.state("s1"), Some(InstanceState::Gone));
    let late = [instance("i1", "s1", InstanceStatus::Started, true)];
    assert!(world.sync(&late).contains(&delete("i1", "s1", false)));
    world.sync(&[]);
    assert_eq!(world.state("s1"), Some(InstanceState::Gone));
    world.pass(40);
    assert!(world.sync(&late).contains(&delete("i1", "s1", true)), "also when it was forgotten");
}

#[test]
fn ending_what_nobody_knows_is_gone_as_soon_as_ams_says_so() {
    let mut world = World::new();
    let (state, work) = world.sessions.end(world.now, &id("s1"), "bye", false);
    assert_eq!((state, work), (InstanceState::Ending, vec![Work::ReadAms]));
    assert!(world.pass(1).contains(&Work::ReadAms), "asked for until it comes");
    world.sync(&[]);
    assert_eq!(world.sessions.end(world.now, &id("s1"), "bye", false).0, InstanceState::Gone);
}

#[test]
fn instances_found_after_a_restart_are_known_by_their_tags() {
    let mut world = World::new();
    let work = world.sync(&[
        instance("i1", "s1", InstanceStatus::Running, true),
        instance("i2", "s2", InstanceStatus::Error, true),
        instance("i3", "s3", InstanceStatus::Running, false),
    ]);
    assert_eq!(work, []);
    let states = world.states();
    assert_eq!(
        states.into_values().collect::<Vec<_>>(),
        [InstanceState::Running, InstanceState::Failed, InstanceState::Running]
    );
    let reports = world.sessions.report_all();
    assert_eq!(reports[1].message.as_deref(), Some("it broke"));
    assert_eq!(world.sessions.accept(world.now, &launch("s1", 1)), Ok(vec![]), "launched before the restart");
}

#[test]
fn what_stopped_gracefully_is_removed_after_it_was_told_unless_ams_owns_it() {
    let mut world = World::new();
    let stopped = [
        instance("i1", "s1", InstanceStatus::Stopped, true),
        instance("i2", "s2", InstanceStatus::Stopped, false),
        instance("i3", "s3", InstanceStatus::Error, true),
    ];
    world.sync(&stopped);
    assert_eq!(world.pass(10), [], "nobody was told yet");
    world.states();
    assert_eq!(world.pass(10), []);
    world.states();
    assert_eq!(world.pass(3), [delete("i1", "s1", false)]);
    world.sync(&stopped[1..]);
    assert_eq!(world.state("s1"), Some(InstanceState::Stopped), "it stays what it was");
    assert_eq!(world.state("s2"), Some(InstanceState::Stopped));
    assert_eq!(world.state("s3"), Some(InstanceState::Failed), "kept for its logs");
    let (state, work) = world.sessions.end(world.now, &id("s1"), "bye", false);
    assert_eq!((state, work), (InstanceState::Gone, vec![]));
    let (_, work) = world.sessions.end(world.now, &id("s3"), "bye", false);
    assert!(work.contains(&delete("i3", "s3", false)), "until the gateway says so");
}

#[test]
fn an_instance_that_vanished_is_gone_and_one_that_was_started_again_is_back() {
    let mut world = World::new();
    world.sync(&[instance("i1", "s1", InstanceStatus::Running, false)]);
    world.sync(&[]);
    assert_eq!(world.state("s1"), Some(InstanceState::Gone));
    world.sync(&[instance("i1", "s1", InstanceStatus::Running, false)]);
    assert_eq!(world.state("s1"), Some(InstanceState::Running));
}

#[test]
fn only_the_newest_connection_of_a_streamer_counts() {
    let mut world = World::new();
    let i1: InstanceId = "i1".parse().expect("valid");
    let work = world.sessions.streamer_connected(world.now, &id("s1"), i1.clone(), 1);
    assert_eq!(work, [Work::ReadAms], "not known from AMS yet");
    world.sessions.streamer_connected(world.now, &id("s1"), i1, 2);
    assert!(!world.sessions.report_changed().remove(0).streamer_connected, "it has not told its state yet");
    let client = ClientStatus { generation: 3, state: fanlight_api::agent_link::ClientState::Streaming };
    let status = StreamerStatus { ready: true, client: Some(client.clone()), ..Default::default() };
    world.sessions.streamer_status(&id("s1"), 1, StreamerStatus::default());
    world.sessions.streamer_status(&id("s1"), 2, status);
    let step = FunnelStep { generation: 3, step: "ice".into(), duration_ms: 5, message: None };
    world.sessions.streamer_step(&id("s1"), 2, step.clone());
    assert_eq!(world.sessions.streamer_gone(&id("s1"), 1), []);
    let report = world.sessions.report_changed().remove(0);
    assert_eq!((report.streamer_connected, report.client), (true, Some(client)));
    assert_eq!(report.steps, [step]);
    assert!(world.sessions.report_all().remove(0).steps.is_empty(), "each is sent once");
    assert_eq!(world.sessions.streamer_gone(&id("s1"), 2), [Work::ReadAms]);
    let report = world.sessions.report_changed().remove(0);
    assert!(!report.streamer_connected);
    assert!(report.client.is_some(), "a client stays when its signalling is cut");
    assert!(!world.sessions.has_changes());
}

#[test]
fn a_streamer_that_comes_back_to_an_ending_session_is_told_so() {
    let mut world = World::new();
    world.sync(&[instance("i1", "s1", InstanceStatus::Running, true)]);
    let i1: InstanceId = "i1".parse().expect("valid");
    world.sessions.streamer_connected(world.now, &id("s1"), i1.clone(), 1);
    let (_, work) = world.sessions.end(world.now, &id("s1"), "time is up", false);
    assert!(work.contains(&Work::EndStream { session_id: id("s1"), message: "time is up".into() }));
    world.sessions.streamer_gone(&id("s1"), 1);
    let work = world.sessions.streamer_connected(world.now, &id("s1"), i1, 2);
    assert!(matches!(&work[..], [Work::EndStream { .. }]));
}
