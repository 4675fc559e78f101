//! A small 3D scene with a tune: arrow keys turn and raise the camera, space makes the cube jump, a click or
//! Tab changes the colours, and dragging turns the camera.

use anyhow::Result;
use fanlight_test_apps::{
    canvas::{Canvas, Rect},
    scene::{Controls, Scene},
    sound,
    window::{self, Drawing, Input, Pace},
};

fn main() -> Result<()> {
    if std::env::args().nth(1).as_deref() != Some("--silent") {
        sound::play("fanlight-scene", sound::tune());
    }
    window::run("fanlight-scene", Game::default(), Pace::Callback)
}

#[derive(Default)]
struct Game {
    scene: Scene,
    controls: Controls,
    pointer: (f64, f64),
    dragging: bool,
    dragged: f32,
    wheeled: f32,
}

/// Evdev codes (linux/input-event-codes.h).
mod key {
    pub const TAB: u32 = 15;
    pub const SPACE: u32 = 57;
    pub const UP: u32 = 103;
    pub const LEFT: u32 = 105;
    pub const RIGHT: u32 = 106;
    pub const DOWN: u32 = 108;
}

impl Drawing for Game {
    fn draw(&mut self, canvas: &mut Canvas<'_>) -> Vec<Rect> {
        let held = self.controls;
        self.controls.turn += std::mem::take(&mut self.dragged);
        self.controls.rise += std::mem::take(&mut self.wheeled);
        self.scene.step(&mut self.controls);
        (self.controls.turn, self.controls.rise) = (held.turn, held.rise);
        vec![self.scene.draw(canvas, self.controls.palette)]
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Key { code, pressed } => {
                let held = |step: f32| if pressed { step } else { 0.0 };
                match code {
                    key::LEFT => self.controls.turn = held(0.03),
                    key::RIGHT => self.controls.turn = held(-0.03),
                    key::UP => self.controls.rise = held(0.05),
                    key::DOWN => self.controls.rise = held(-0.05),
                    key::SPACE if pressed => self.controls.jump = true,
                    key::TAB if pressed => self.controls.palette += 1,
                    _ => {}
                }
            }
            Input::Pointer { x, y } => {
                if self.dragging {
                    self.dragged += (x - self.pointer.0) as f32 * 0.005;
                }
                self.pointer = (x, y);
            }
            Input::Button { pressed, .. } => {
                self.dragging = pressed;
                if pressed {
                    self.controls.palette += 1;
                }
            }
            Input::Wheel(down) => self.wheeled -= down as f32 * 0.02,
        }
    }
}
