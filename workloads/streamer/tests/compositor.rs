//! The compositor with real applications: what they draw is in the pictures, what is typed reaches them.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use fanlight_streamer::compositor::{Compositor, Config, Cursor, Event, Frame, Input, Picture};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long nothing must happen where nothing should.
const QUIET: Duration = Duration::from_millis(1500);

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
        let runtime = tempfile::tempdir().expect("a temporary directory");
        let (sender, events) = mpsc::channel();
        let config = Config {
            width,
            height,
            fps: 60,
            runtime_dir: runtime.path().join("run"),
            xwayland,
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
    display.wait("the X11 client", |event| match event {
        Event::Clients { x11: 1, wayland: 0 } => Some(()),
        _ => None,
    });
    display.wait("the first window", |event| matches!(event, Event::FirstWindow).then_some(()));
    let picture = display.settle().expect("it draws");
    let bright = |x, y| yuv(&picture, x, y).0 > 60;
    assert!(bright(4, 4) && bright(635, 4) && bright(4, 475) && bright(635, 475), "corners are its own");
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
