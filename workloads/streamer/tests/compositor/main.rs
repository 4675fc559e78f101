//! The compositor with real applications: what they draw is in the pictures, what is typed reaches them.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

mod client;

use client::{Client, is_refused};
use fanlight_streamer::compositor::{Compositor, Config, Cursor, Event, Frame, Input, Picture, Xwayland};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long nothing must happen where nothing should.
const QUIET: Duration = Duration::from_millis(1500);

/// The alpha channel.
const OPAQUE: u32 = 0xff00_0000;

const BTN_LEFT: u32 = 0x110;
const KEY_ENTER: u32 = 28;
const KEY_SPACE: u32 = 57;

/// A compositor, its events and the applications started in it.
struct Display {
    compositor: Compositor,
    events: mpsc::Receiver<Event>,
    applications: Vec<Child>,
    runtime: tempfile::TempDir,
}

impl Display {
    fn start(xwayland: bool) -> Self {
        Self::sized(640, 480, xwayland)
    }

    fn sized(width: u32, height: u32, xwayland: bool) -> Self {
        // `RUST_LOG=debug` shows what the compositor and Xwayland say.
        let log = tracing_subscriber::EnvFilter::from_default_env();
        let _ = tracing_subscriber::fmt().with_env_filter(log).with_test_writer().try_init();
        let runtime = tempfile::tempdir().expect("a temporary directory");
        let (sender, events) = mpsc::channel();
        let config = Config {
            width,
            height,
            fps: 60,
            runtime_dir: runtime.path().join("run"),
            xwayland: match xwayland {
                true => Xwayland::OnDemand(env!("CARGO_BIN_EXE_fanlight-streamer").into()),
                false => Xwayland::Never,
            },
            keyboard_layout: "us".into(),
        };
        let compositor = Compositor::start(config, move |event| {
            let _ = sender.send(event);
        })
        .expect("the compositor starts");
        Self { compositor, events, applications: Vec::new(), runtime }
    }

    fn variable(&self, name: &str) -> Option<String> {
        self.compositor.environment().into_iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    fn run(&mut self, program: &str, arguments: &[&str]) {
        let mut command = Command::new(program);
        command.args(arguments).env_clear();
        for name in ["PATH", "LANG"] {
            command.envs(std::env::var_os(name).map(|value| (name, value)));
        }
        let child = command
            .env("LC_ALL", "C.UTF-8")
            .env("HOME", self.runtime.path())
            .envs(self.compositor.environment())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{program} has to be installed: {error}"));
        self.applications.push(child);
    }

    /// A terminal in one colour without a cursor, running `script`.
    fn run_foot(&mut self, background: &str, script: &str) {
        let colour = format!("colors.background={background}");
        let cursor = format!("cursor.color={background} {background}");
        let options = ["-c", "/dev/null", "-o", &colour, "-o", &cursor, "-o", "scrollback.lines=0"];
        let shell = ["sh", "-c", script];
        self.run("foot", &[&options[..], &shell[..]].concat());
    }

    /// The next event that `take` wants.
    fn wait<T>(&self, what: &str, mut take: impl FnMut(Event) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::Failed(error)) => panic!("waiting for {what}: {error}"),
                Ok(event) => {
                    if let Some(taken) = take(event) {
                        return taken;
                    }
                }
                Err(error) => panic!("waiting for {what}: {error}"),
            }
        }
    }

    /// The next frame that `wanted` accepts.
    fn frame(&self, what: &str, mut wanted: impl FnMut(&Frame) -> bool) -> Frame {
        self.wait(what, |event| match event {
            Event::Frame(frame) if wanted(&frame) => Some(frame),
            _ => None,
        })
    }

    /// Frames until nothing comes for a while; the last one.
    fn settle(&self) -> Option<Arc<Picture>> {
        let mut last = None;
        let deadline = Instant::now() + PATIENCE;
        while let Ok(event) = self.events.recv_timeout(QUIET) {
            if let Event::Frame(frame) = event {
                last = Some(frame.picture);
            }
            assert!(Instant::now() < deadline, "frames never end");
        }
        last
    }

    /// A client of the test's own.
    fn client(&self) -> Client {
        let display = self.variable("WAYLAND_DISPLAY").expect("it listens");
        Client::connect(&self.runtime.path().join("run"), &display)
    }

    /// Proof that the compositor still serves others: a new window comes up.
    fn assert_well(&self) {
        self.compositor.set_active(true);
        let mut client = self.client();
        let colour = 0x2040a0;
        let window = client.window(OPAQUE | colour, None, None);
        self.frame("a window of a client that behaves", |frame| fills(frame, colour));
        window.destroy();
        assert!(client.roundtrip());
    }

    fn type_keys(&self, codes: &[u32]) {
        for code in codes {
            self.compositor.input(Input::Key { code: *code, pressed: true });
            self.compositor.input(Input::Key { code: *code, pressed: false });
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        for application in &mut self.applications {
            let _ = application.kill();
            let _ = application.wait();
        }
        self.compositor.stop();
    }
}

/// The colour at a pixel as (Y, U, V).
fn yuv(picture: &Picture, x: u32, y: u32) -> (u8, u8, u8) {
    let (width, x, y) = (picture.width() as usize, x as usize, y as usize);
    let chroma = y / 2 * (width / 2) + x / 2;
    (picture.y()[y * width + x], picture.u()[chroma], picture.v()[chroma])
}

/// BT.709 limited range of an RGB colour, by the definition in floating point.
fn expected(rgb: u32) -> (u8, u8, u8) {
    let part = |shift: u32| f64::from(rgb >> shift & 0xff) / 255.0;
    let (r, g, b) = (part(16), part(8), part(0));
    let y = 0.2126 * r + 0.7152 * g + 0.0722 * b;
    let (u, v) = ((b - y) / 1.8556, (r - y) / 1.5748);
    let round = |value: f64| value.round() as u8;
    (round(16.0 + 219.0 * y), round(128.0 + 224.0 * u), round(128.0 + 224.0 * v))
}

fn is_colour(picture: &Picture, x: u32, y: u32, rgb: u32) -> bool {
    let (got, want) = (yuv(picture, x, y), expected(rgb));
    let near = |a: u8, b: u8| a.abs_diff(b) <= 4;
    near(got.0, want.0) && near(got.1, want.1) && near(got.2, want.2)
}

fn fills(frame: &Frame, rgb: u32) -> bool {
    let (width, height) = (frame.width, frame.height);
    [(2, 2), (width - 3, 2), (2, height - 3), (width - 3, height - 3), (width / 2, height / 2)]
        .into_iter()
        .all(|(x, y)| is_colour(&frame.picture, x, y, rgb))
}

fn evdev(text: &str) -> Vec<u32> {
    const ROWS: [(u32, &str); 4] =
        [(2, "1234567890-="), (16, "qwertyuiop[]"), (30, "asdfghjkl;'"), (44, "zxcvbnm,./")];
    let code = |wanted: char| {
        if wanted == ' ' {
            return KEY_SPACE;
        }
        let found = ROWS.iter().find_map(|(first, row)| row.find(wanted).map(|at| first + at as u32));
        found.unwrap_or_else(|| panic!("no key for {wanted:?}"))
    };
    text.chars().map(code).collect()
}

fn wait_for_file(path: &Path) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match std::fs::read_to_string(path) {
            Ok(text) if !text.is_empty() => return text,
            _ => assert!(Instant::now() < deadline, "{} is not written", path.display()),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_terminal_fills_the_picture_with_its_colour() {
    let mut display = Display::start(false);
    display.compositor.set_active(true);
    display.run_foot("1e6432", "sleep 1000");
    let frame = display.frame("a green picture", |frame| fills(frame, 0x1e6432));
    assert_eq!((frame.width, frame.height), (640, 480));
    assert!(frame.rendered >= frame.committed);
}

#[test]
fn typed_keys_reach_the_terminal_and_change_the_picture() {
    let mut display = Display::start(false);
    display.compositor.set_active(true);
    let answer = display.runtime.path().join("answer");
    display.run_foot(
        "000000",
        &format!("read line; echo \"$line\" > {}; printf '\\033[47m\\033[2J'; sleep 1000", answer.display()),
    );
    display.wait("the first window", |event| matches!(event, Event::FirstWindow).then_some(()));
    display.settle();
    display.type_keys(&evdev("hello fanlight"));
    let typed = display.frame("the echo of the keys", |_| true);
    assert!(!typed.damage.is_empty());
    display.type_keys(&[KEY_ENTER]);
    assert_eq!(wait_for_file(&answer), "hello fanlight\n");
    display.frame("a bright picture", |frame| yuv(&frame.picture, 320, 240).0 > 120);
}

#[test]
fn an_idle_screen_makes_no_frames() {
    let mut display = Display::start(false);
    display.compositor.set_active(true);
    display.run_foot("203040", "sleep 1000");
    display.frame("the terminal", |frame| fills(frame, 0x203040));
    display.settle();
    assert!(display.events.recv_timeout(QUIET).is_err(), "nothing happens, nothing is told");
}

#[test]
fn nobody_watching_gets_no_frames_and_somebody_coming_gets_a_whole_one() {
    let mut display = Display::start(false);
    display.run_foot("643232", "sleep 1000");
    display.wait("the first window", |event| matches!(event, Event::FirstWindow).then_some(()));
    assert!(display.settle().is_none(), "frames without being asked");
    display.compositor.set_active(true);
    let frame = display.frame("the first frame", |_| true);
    assert!(fills(&frame, 0x643232));
    let whole = &frame.damage[0];
    assert_eq!((whole.x, whole.y, whole.width, whole.height), (0, 0, 640, 480));

    display.settle();
    display.compositor.refresh();
    let again = display.frame("a frame by request", |_| true);
    assert!(fills(&again, 0x643232));
    assert_eq!(again.damage.len(), 1);
    assert!(again.sequence > frame.sequence);
}

#[test]
fn a_new_size_is_followed_by_the_terminal() {
    let mut display = Display::start(false);
    display.compositor.set_active(true);
    display.run_foot("323264", "sleep 1000");
    display.frame("the terminal", |frame| fills(frame, 0x323264));
    display.compositor.resize(801, 599, 30);
    let frame = display.frame("the new size", |frame| frame.width == 802 && fills(frame, 0x323264));
    assert_eq!(frame.height, 600);
}

#[test]
fn a_slow_encoder_costs_frames_and_no_memory() {
    let mut display = Display::start(false);
    display.compositor.set_active(true);
    display
        .run_foot("101010", "while :; do printf '\\033[4%dm\\033[2J' $((i = (i + 1) % 7)); sleep 0.01; done");
    let mut held = Vec::new();
    while held.len() < fanlight_streamer::compositor::POOL {
        held.push(display.frame("a frame", |_| true).picture);
    }
    let stuck = display.events.recv_timeout(QUIET);
    assert!(!matches!(stuck, Ok(Event::Frame(_))), "all pictures are held, yet a frame came");
    held.clear();
    display.frame("a frame after the pictures came back", |_| true);
}

#[test]
fn applications_are_counted() {
    let mut display = Display::start(false);
    let count = |display: &Display, wanted: usize| {
        display.wait("the count", |event| match event {
            Event::Clients { wayland, .. } if wayland == wanted => Some(()),
            _ => None,
        });
    };
    display.run_foot("000000", "sleep 1000");
    count(&display, 1);
    display.run_foot("000000", "sleep 1000");
    count(&display, 2);
    display.applications[0].kill().expect("still running");
    count(&display, 1);
    display.applications[1].kill().expect("still running");
    count(&display, 0);
}

#[test]
fn the_pointer_is_told_by_its_shape() {
    let mut display = Display::start(false);
    display.compositor.set_active(true);
    display.run_foot("000000", "sleep 1000");
    display.frame("the terminal", |_| true);
    display.compositor.input(Input::PointerMotion { x: 300.0, y: 200.0 });
    display.wait("the pointer of a terminal", |event| match event {
        Event::Cursor(Cursor::Named("text") | Cursor::Image(_)) => Some(()),
        _ => None,
    });
}

#[test]
fn text_is_typed_whatever_the_layout_has() {
    let mut display = Display::start(false);
    let answer = display.runtime.path().join("answer");
    display.run_foot("000000", &format!("read line; echo \"$line\" > {}; sleep 1000", answer.display()));
    display.wait("the first window", |event| matches!(event, Event::FirstWindow).then_some(()));
    display.compositor.input(Input::Text { text: "größe → 漢字 ok".into() });
    display.type_keys(&[KEY_ENTER]);
    assert_eq!(wait_for_file(&answer), "größe → 漢字 ok\n");
}

#[test]
fn everything_held_is_released_at_once() {
    let mut display = Display::start(false);
    let answer = display.runtime.path().join("answer");
    display.run_foot("000000", &format!("read line; echo \"$line\" > {}; sleep 1000", answer.display()));
    display.wait("the first window", |event| matches!(event, Event::FirstWindow).then_some(()));
    const KEY_LEFTSHIFT: u32 = 42;
    display.compositor.input(Input::Key { code: KEY_LEFTSHIFT, pressed: true });
    display.type_keys(&evdev("a"));
    display.compositor.release_all();
    display.type_keys(&evdev("b"));
    display.type_keys(&[KEY_ENTER]);
    assert_eq!(wait_for_file(&answer), "Ab\n");
}

#[test]
fn another_layout_types_other_characters() {
    let mut display = Display::start(false);
    let answer = display.runtime.path().join("answer");
    display.run_foot("000000", &format!("read line; echo \"$line\" > {}; sleep 1000", answer.display()));
    display.wait("the first window", |event| matches!(event, Event::FirstWindow).then_some(()));
    display.compositor.set_keyboard_layout("no such layout");
    display.compositor.set_keyboard_layout("de");
    display.type_keys(&evdev("yz;"));
    display.type_keys(&[KEY_ENTER]);
    assert_eq!(wait_for_file(&answer), "zyö\n");
}

#[test]
fn an_x11_application_is_shown_and_fills_the_picture() {
    let mut display = Display::start(true);
    assert!(display.variable("DISPLAY").is_some(), "Xwayland is installed");
    display.compositor.set_active(true);
    display.run("mtpaint", &[]);
    let (mut counted, mut shown) = (false, false);
    display.wait("the X11 application", |event| {
        counted |= matches!(event, Event::Clients { x11: 1, wayland: 0 });
        shown |= matches!(event, Event::FirstWindow);
        (counted && shown).then_some(())
    });
    let picture = display.settle().expect("it draws");
    let bright = |x, y| yuv(&picture, x, y).0 > 60;
    assert!(bright(4, 4) && bright(635, 4) && bright(635, 475), "its bars reach the corners");

    // Its File menu, an X11 window that places itself, and away with it by a key.
    display.compositor.input(Input::PointerMotion { x: 14.0, y: 10.0 });
    for pressed in [true, false] {
        display.compositor.input(Input::Button { code: BTN_LEFT, pressed });
    }
    let menu = display.settle().expect("the menu opens");
    assert_ne!(menu.y(), picture.y());
    const KEY_ESC: u32 = 1;
    display.type_keys(&[KEY_ESC]);
    let closed = display.settle().expect("the menu closes");
    assert_ne!(menu.y(), closed.y());

    display.compositor.resize(800, 600, 60);
    display.frame("its bars in the new corners", |frame| {
        let bright = |x, y| yuv(&frame.picture, x, y).0 > 60;
        frame.width == 800 && bright(4, 4) && bright(795, 4) && bright(795, 595)
    });
}

#[test]
fn xwayland_that_dies_is_started_again_on_the_same_display() {
    let mut display = Display::start(true);
    display.compositor.set_active(true);
    let number = display.variable("DISPLAY").expect("Xwayland is installed");
    let lock = format!("/tmp/.X{}-lock", number.trim_start_matches(':'));
    display.run("mtpaint", &[]);
    display.wait("the X11 application", |event| matches!(event, Event::FirstWindow).then_some(()));
    // The lock names this process, so look for its child by what it was started with.
    assert!(Path::new(&lock).exists());
    let server = child_named("Xwayland", &number).expect("it runs");
    assert!(Command::new("kill").args(["-9", &server.to_string()]).status().expect("kill runs").success());
    display.wait("the news", |event| matches!(event, Event::XwaylandExited).then_some(()));
    let deadline = Instant::now() + PATIENCE;
    while child_named("Xwayland", &number).is_none_or(|again| again == server) {
        assert!(Instant::now() < deadline, "Xwayland is not started again");
        std::thread::sleep(Duration::from_millis(20));
    }
    display.run("mtpaint", &[]);
    display.frame("an X11 application again", |frame| yuv(&frame.picture, 4, 4).0 > 60);
}

/// A child of this process with this name and this first argument.
fn child_named(name: &str, argument: &str) -> Option<u32> {
    let me = std::process::id().to_string();
    std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let id: u32 = entry.file_name().to_str()?.parse().ok()?;
        let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
        let is_mine =
            status.lines().any(|line| line.strip_prefix("PPid:").is_some_and(|parent| parent.trim() == me));
        let command = std::fs::read(entry.path().join("cmdline")).ok()?;
        let mut words = command.split(|byte| *byte == 0);
        let is_it = words.next()?.ends_with(name.as_bytes()) && words.next()? == argument.as_bytes();
        (is_mine && is_it).then_some(id)
    })
}

#[test]
fn stopping_ends_xwayland_and_frees_its_display() {
    let display = Display::start(true);
    let number = display.variable("DISPLAY").expect("Xwayland is installed");
    let socket = format!("/tmp/.X11-unix/X{}", number.trim_start_matches(':'));
    assert!(Path::new(&socket).exists());
    display.compositor.stop();
    display.compositor.stop();
    assert!(!Path::new(&socket).exists());
}

#[test]
fn windows_are_told_to_fill_and_dialogs_are_centred() {
    let display = Display::start(false);
    display.compositor.set_active(true);
    let mut client = display.client();
    let main = client.window(OPAQUE | 0xa02020, None, None);
    assert_eq!(main.size, (640, 480), "a main window is given the whole output");
    display.frame("the main window", |frame| fills(frame, 0xa02020));
    let dialog = client.window(OPAQUE | 0x20a020, Some((200, 100)), Some(&main));
    assert_eq!(client.seen.sizes.last(), Some(&(0, 0)), "a dialog chooses its size");
    display.frame("the dialog in the middle", |frame| {
        let picture = &frame.picture;
        is_colour(picture, 320, 240, 0x20a020)
            && is_colour(picture, 224, 194, 0x20a020)
            && is_colour(picture, 214, 184, 0xa02020)
            && is_colour(picture, 416, 286, 0x20a020)
            && is_colour(picture, 424, 296, 0xa02020)
    });
    // A click on the main window does not bury its dialog.
    display.compositor.input(Input::PointerMotion { x: 10.0, y: 10.0 });
    display.compositor.input(Input::Button { code: BTN_LEFT, pressed: true });
    display.compositor.input(Input::Button { code: BTN_LEFT, pressed: false });
    client.wait("the click", |seen| seen.buttons == [(BTN_LEFT, true), (BTN_LEFT, false)]);
    assert_eq!(client.seen.pointer, Some((10.0, 10.0)));
    display.compositor.refresh();
    display.frame("the dialog still there", |frame| is_colour(&frame.picture, 320, 240, 0x20a020));
    dialog.destroy();
    client.roundtrip();
    display.frame("the main window alone", |frame| fills(frame, 0xa02020));
}

#[test]
fn the_newest_window_is_in_front_and_the_one_before_comes_back() {
    let display = Display::start(false);
    display.compositor.set_active(true);
    let (mut first, mut second) = (display.client(), display.client());
    let _below = first.window(OPAQUE | 0x803010, None, None);
    display.frame("the first window", |frame| fills(frame, 0x803010));
    first.wait("the keyboard", |seen| seen.has_keyboard);
    let above = second.window(OPAQUE | 0x103080, None, None);
    display.frame("the second window", |frame| fills(frame, 0x103080));
    second.wait("the keyboard", |seen| seen.has_keyboard);
    first.wait("the keyboard to leave", |seen| !seen.has_keyboard);
    display.type_keys(&[KEY_SPACE]);
    second.wait("a key", |seen| seen.keys == [(KEY_SPACE, true), (KEY_SPACE, false)]);
    above.destroy();
    second.roundtrip();
    display.frame("the first window again", |frame| fills(frame, 0x803010));
    first.wait("the keyboard again", |seen| seen.has_keyboard);
    assert_eq!(first.seen.keys, []);
}

#[test]
fn a_popup_slides_onto_the_output() {
    let display = Display::start(false);
    display.compositor.set_active(true);
    let mut client = display.client();
    let main = client.window(OPAQUE | 0x404040, None, None);
    let (_surface, popup) = client.popup(&main, (600, 470), (100, 60), OPAQUE | 0xd0d020);
    assert_eq!(client.seen.popups, [(540, 420, 100, 60)]);
    display.frame("the popup in the corner", |frame| {
        is_colour(&frame.picture, 636, 476, 0xd0d020) && is_colour(&frame.picture, 536, 416, 0x404040)
    });
    popup.destroy();
    client.roundtrip();
    display.frame("no popup", |frame| fills(frame, 0x404040));
}

#[test]
fn a_small_change_is_small_and_every_recycled_picture_is_whole() {
    let display = Display::start(false);
    display.compositor.set_active(true);
    let mut client = display.client();
    let main = client.window(OPAQUE | 0x305070, None, None);
    display.frame("the window", |frame| fills(frame, 0x305070));
    let part = client.part(&main.surface, (100, 60), (40, 20), OPAQUE | 0xe0e0e0);
    display.frame("its part", |frame| is_colour(&frame.picture, 120, 70, 0xe0e0e0));
    let mut held = std::collections::VecDeque::new();
    for turn in 0..24u32 {
        let colour = 0x101010 * (1 + turn % 14);
        client.show(&part, (40, 20), OPAQUE | colour);
        let frame = display.frame("the change", |frame| is_colour(&frame.picture, 120, 70, colour));
        for rect in &frame.damage {
            assert!(
                rect.x >= 100 && rect.y >= 60 && rect.x + rect.width <= 140 && rect.y + rect.height <= 80
            );
        }
        assert!(fills(&frame, 0x305070), "the rest of a recycled picture");
        // Hold some back in a pattern, so that pictures of all ages come up.
        held.push_back(frame.picture);
        while held.len() > (turn % 4) as usize {
            held.pop_front();
        }
    }
}

#[test]
fn pointer_wheel_and_touch_reach_the_surface_under_them() {
    let display = Display::start(false);
    let mut client = display.client();
    let _main = client.window(OPAQUE | 0x305070, None, None);
    let send = |input| display.compositor.input(input);
    send(Input::PointerMotion { x: 5000.0, y: -3.0 });
    client.wait("the pointer at the edge", |seen| seen.pointer == Some((639.0, 0.0)));
    send(Input::PointerMotion { x: 30.5, y: 40.25 });
    send(Input::PointerRelative { dx: 10.0, dy: -20.0 });
    client.wait("the pointer", |seen| seen.pointer == Some((40.5, 20.25)));
    send(Input::Wheel { horizontal: 1, vertical: 1 });
    client.wait("scrolling", |seen| seen.scrolled == (15.0, -15.0));
    send(Input::TouchDown { slot: 3, x: 7.0, y: 8.0 });
    send(Input::TouchDown { slot: 3, x: 1.0, y: 1.0 });
    send(Input::TouchMotion { slot: 3, x: 9.0, y: 8.0 });
    send(Input::TouchMotion { slot: 4, x: 9.0, y: 8.0 });
    send(Input::TouchUp { slot: 3 });
    send(Input::TouchUp { slot: 3 });
    send(Input::TouchDown { slot: 0, x: 1.0, y: 2.0 });
    send(Input::Button { code: BTN_LEFT, pressed: true });
    display.compositor.release_all();
    client.wait("fingers", |seen| seen.touches.last().is_some_and(|last| last == "cancel"));
    let ids_apart: Vec<_> =
        client.seen.touches.iter().map(|touch| touch.split(' ').next().unwrap_or("")).collect();
    assert_eq!(ids_apart, ["down", "motion", "up", "down", "motion", "cancel"]);
    assert!(client.seen.touches[1].ends_with(" 9 8"), "{:?}", client.seen.touches);
    client.wait("the button to be released", |seen| seen.buttons == [(BTN_LEFT, true), (BTN_LEFT, false)]);
}

#[test]
fn nonsense_input_changes_nothing() {
    let display = Display::start(false);
    let mut client = display.client();
    let _main = client.window(OPAQUE | 0x305070, None, None);
    client.wait("the keyboard", |seen| seen.has_keyboard);
    for input in [
        Input::Key { code: 0, pressed: true },
        Input::Key { code: u32::MAX, pressed: true },
        Input::Key { code: 30, pressed: false },
        Input::PointerMotion { x: f64::NAN, y: f64::INFINITY },
        Input::PointerRelative { dx: f64::NAN, dy: 0.0 },
        Input::PointerRelative { dx: f64::MAX, dy: f64::MIN },
        Input::Button { code: u32::MAX, pressed: false },
        Input::Wheel { horizontal: i32::MIN, vertical: i32::MIN },
        Input::Wheel { horizontal: 0, vertical: 0 },
        Input::TouchUp { slot: u32::MAX },
        Input::TouchDown { slot: u32::MAX, x: f64::NAN, y: f64::NEG_INFINITY },
        Input::TouchCancel,
        Input::Text { text: String::new() },
        Input::Text { text: "\0\u{1}".into() },
    ] {
        display.compositor.input(input);
    }
    display.type_keys(&[KEY_SPACE]);
    client.wait("a key", |seen| seen.keys == [(KEY_SPACE, true), (KEY_SPACE, false)]);
    display.assert_well();
}

#[test]
fn a_locked_pointer_stays_and_tells_its_movement() {
    let display = Display::start(false);
    let mut client = display.client();
    let main = client.window(OPAQUE | 0x305070, None, None);
    let send = |input| display.compositor.input(input);
    send(Input::PointerMotion { x: 100.0, y: 100.0 });
    client.wait("the pointer", |seen| seen.pointer == Some((100.0, 100.0)));
    let lock = client.lock_pointer(&main.surface);
    client.wait("the lock", |seen| seen.locked);
    display.wait("the news of the lock", |event| matches!(event, Event::PointerLock(true)).then_some(()));
    send(Input::PointerRelative { dx: 3.0, dy: -4.0 });
    // A viewer who cannot lock the pointer sends positions; they count as movement.
    send(Input::PointerMotion { x: 200.0, y: 100.0 });
    send(Input::PointerMotion { x: 205.0, y: 101.0 });
    client.wait("the movement", |seen| seen.relative == [(3.0, -4.0), (5.0, 1.0)]);
    assert_eq!(client.seen.pointer, Some((100.0, 100.0)));
    lock.destroy();
    client.roundtrip();
    display.wait("the news of the release", |event| matches!(event, Event::PointerLock(false)).then_some(()));
}

#[test]
fn clients_are_called_back_while_nobody_watches() {
    let display = Display::start(false);
    let mut client = display.client();
    let main = client.window(OPAQUE | 0x305070, None, None);
    for wanted in 1..=2 {
        client.ask_callback(&main.surface);
        main.surface.commit();
        client.wait("a callback", |seen| seen.callbacks == wanted);
    }
}

#[test]
fn a_client_that_breaks_the_protocol_is_the_only_one_that_ends() {
    use wayland_client::protocol::wl_shm::Format;
    let display = Display::start(false);
    type Crime = fn(&mut Client);
    let crimes: [(&str, Crime); 5] = [
        ("a buffer larger than its memory", |client| {
            let file = tempfile::tempfile().expect("a temporary file");
            file.set_len(4096).expect("there is room");
            let pool = client.shm.create_pool(std::os::fd::AsFd::as_fd(&file), 4096, &client.handle(), ());
            pool.create_buffer(0, 30_000, 30_000, 120_000, Format::Argb8888, &client.handle(), ());
        }),
        ("a buffer whose size overflows", |client| {
            let file = tempfile::tempfile().expect("a temporary file");
            file.set_len(4096).expect("there is room");
            let pool = client.shm.create_pool(std::os::fd::AsFd::as_fd(&file), 4096, &client.handle(), ());
            pool.create_buffer(
                i32::MAX,
                i32::MAX,
                i32::MAX,
                i32::MAX,
                Format::Argb8888,
                &client.handle(),
                (),
            );
        }),
        ("a pool of negative size", |client| {
            let file = tempfile::tempfile().expect("a temporary file");
            client.shm.create_pool(std::os::fd::AsFd::as_fd(&file), -1, &client.handle(), ());
        }),
        ("content before the first configure", |client| {
            let surface = client.compositor.create_surface(&client.handle(), ());
            let xdg = client.xdg_surface(&surface);
            xdg.get_toplevel(&client.handle(), ());
            let buffer = client.buffer((10, 10), OPAQUE);
            surface.attach(Some(&buffer), 0, 0);
            surface.commit();
        }),
        ("a popup without a size", |client| {
            let parent = client.window(OPAQUE, None, None);
            let surface = client.compositor.create_surface(&client.handle(), ());
            let xdg = client.xdg_surface(&surface);
            let positioner = client.positioner();
            positioner.set_size(-5, 0);
            xdg.get_popup(Some(&parent.xdg), &positioner, &client.handle(), ());
        }),
    ];
    for (name, crime) in crimes {
        let mut client = display.client();
        crime(&mut client);
        assert!(is_refused(&mut client), "{name}: {:?}", client.connection.protocol_error());
        display.assert_well();
    }
}

#[test]
fn absurd_numbers_and_vanishing_memory_harm_nobody() {
    let display = Display::start(false);
    display.compositor.set_active(true);
    let mut client = display.client();
    let main = client.window(OPAQUE | 0x305070, None, None);

    let positioner = client.positioner();
    positioner.set_size(i32::MAX, i32::MAX);
    positioner.set_anchor_rect(i32::MIN, i32::MIN, i32::MAX, i32::MAX);
    positioner.set_offset(i32::MAX, i32::MIN);
    let popup = client.compositor.create_surface(&client.handle(), ());
    let xdg = client.xdg_surface(&popup);
    xdg.get_popup(Some(&main.xdg), &positioner, &client.handle(), ());
    popup.commit();
    // It may be refused; it must not matter to others.
    client.roundtrip();
    display.assert_well();

    let mut client = display.client();
    let main = client.window(OPAQUE | 0x305070, None, None);
    main.xdg.set_window_geometry(i32::MIN, i32::MIN, i32::MAX, i32::MAX);
    main.surface.damage(i32::MIN, i32::MIN, i32::MAX, i32::MAX);
    main.surface.damage_buffer(i32::MAX, i32::MAX, i32::MAX, i32::MAX);
    main.surface.set_buffer_scale(i32::MAX);
    main.toplevel.set_max_size(i32::MAX, i32::MAX);
    main.toplevel.set_min_size(i32::MAX, i32::MAX);
    let buffer = client.buffer((64, 48), OPAQUE | 0x808080);
    main.surface.attach(Some(&buffer), 0, 0);
    main.surface.commit();
    client.roundtrip();
    display.assert_well();

    let mut client = display.client();
    let main = client.window(OPAQUE | 0x305070, None, None);
    let part = client.part(&main.surface, (i32::MAX, i32::MIN), (40, 20), OPAQUE);
    client.part(&part, (i32::MAX, i32::MIN), (40, 20), OPAQUE);
    display.assert_well();

    // A file that is cut off after it was mapped: reading it faults.
    let mut client = display.client();
    let main = client.window(OPAQUE | 0x305070, None, None);
    let file = tempfile::tempfile().expect("a temporary file");
    file.set_len(640 * 480 * 4).expect("there is room");
    let pool = client.shm.create_pool(std::os::fd::AsFd::as_fd(&file), 640 * 480 * 4, &client.handle(), ());
    let format = wayland_client::protocol::wl_shm::Format::Xrgb8888;
    let buffer = pool.create_buffer(0, 640, 480, 640 * 4, format, &client.handle(), ());
    client.roundtrip();
    file.set_len(0).expect("files can be cut off");
    main.surface.attach(Some(&buffer), 0, 0);
    main.surface.damage_buffer(0, 0, 640, 480);
    main.surface.commit();
    client.roundtrip();
    display.assert_well();
}

#[test]
fn a_client_that_floods_is_cut_off() {
    let display = Display::start(false);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flood = std::thread::spawn({
        let (mut client, stop) = (display.client(), Arc::clone(&stop));
        move || {
            let main = client.window(OPAQUE | 0x305070, None, None);
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for _ in 0..1000 {
                    main.surface.damage(0, 0, 1, 1);
                    main.surface.commit();
                }
                if client.connection.flush().is_err() && client.connection.protocol_error().is_none() {
                    // The socket is full, or closed for good.
                    std::thread::yield_now();
                }
            }
        }
    });
    for _ in 0..3 {
        display.assert_well();
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    flood.join().expect("it only writes");
}
