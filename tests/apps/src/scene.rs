//! A small moving 3D scene, drawn by the processor: shaded solids over a moving chequered floor. It stands
//! in for a game where there is no OpenGL, so it has to look alive and cost little. Pure: time comes in as
//! the number of the frame.

use crate::canvas::{Canvas, Rect};

type Vector = [f32; 3];

/// What the player has done so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Controls {
    /// Turning of the camera in radians per frame: −, 0 or + one step.
    pub turn: f32,
    /// Change of the camera's height per frame.
    pub rise: f32,
    /// A jump of the cube was asked for.
    pub jump: bool,
    /// Number of the palette.
    pub palette: usize,
}

/// State of the scene.
pub struct Scene {
    frame: u32,
    angle: f32,
    height: f32,
    jump_speed: f32,
    jump_height: f32,
    solids: Vec<Solid>,
    faces: Vec<Face>,
}

struct Solid {
    points: Vec<Vector>,
    faces: Vec<Vec<usize>>,
    place: Vector,
    spin: Vector,
    colour: usize,
}

/// A face as it appears on the screen.
struct Face {
    depth: f32,
    corners: Vec<(f32, f32)>,
    colour: u32,
}

/// Sky top, sky bottom, floor light, floor dark, and three solids.
const PALETTES: [[u32; 7]; 4] = [
    [0x0b1d3a, 0x5a8fc4, 0xe8e2d0, 0x4a5a6a, 0xe05a3a, 0x3ab08a, 0xe6b840],
    [0x2a0f2e, 0xf08a5a, 0xf4d8b0, 0x6a3a4a, 0x40a0d0, 0xf0d050, 0xd05090],
    [0x062018, 0x7ac890, 0xd8f0d0, 0x2a5a40, 0xd0c040, 0x5080e0, 0xe06060],
    [0x101018, 0x606878, 0xd0d0d8, 0x383840, 0x90e0f0, 0xf090c0, 0xa0f090],
];

impl Default for Scene {
    fn default() -> Self {
        Self {
            frame: 0,
            angle: 0.0,
            height: 3.2,
            jump_speed: 0.0,
            jump_height: 0.0,
            solids: vec![cube(), octahedron(), torus()],
            faces: Vec::new(),
        }
    }
}

impl Scene {
    /// One step of the world, at 60 a second.
    pub fn step(&mut self, controls: &mut Controls) {
        self.frame = self.frame.wrapping_add(1);
        self.angle = (self.angle + 0.006 + controls.turn).rem_euclid(std::f32::consts::TAU);
        self.height = (self.height + controls.rise).clamp(1.2, 7.0);
        if std::mem::take(&mut controls.jump) && self.jump_height == 0.0 {
            self.jump_speed = 0.16;
        }
        self.jump_height = (self.jump_height + self.jump_speed).max(0.0);
        self.jump_speed = if self.jump_height == 0.0 { 0.0 } else { self.jump_speed - 0.008 };
    }

    /// Paints the whole picture.
    pub fn draw(&mut self, canvas: &mut Canvas<'_>, palette: usize) -> Rect {
        let colours = &PALETTES[palette % PALETTES.len()];
        let (width, height) = (canvas.width as f32, canvas.height as f32);
        let scale = height * 0.9;
        // The camera circles the origin and looks a little down at it.
        let distance = 9.0_f32;
        let pitch = (self.height - 1.0).atan2(distance);
        let (sin_angle, cos_angle) = self.angle.sin_cos();
        let (sin_pitch, cos_pitch) = pitch.sin_cos();
        let eye = [sin_angle * distance, self.height, -cos_angle * distance];
        let to_view = |point: Vector| -> Vector {
            let [x, y, z] = [point[0] - eye[0], point[1] - eye[1], point[2] - eye[2]];
            let (across, ahead) = (x * cos_angle + z * sin_angle, z * cos_angle - x * sin_angle);
            [across, y * cos_pitch + ahead * sin_pitch, ahead * cos_pitch - y * sin_pitch]
        };

        // The horizon is where a ray is level.
        let horizon = (height / 2.0 - sin_pitch / cos_pitch * scale).clamp(0.0, height) as usize;
        for y in 0..horizon.min(canvas.height) {
            let mixed = mix(colours[0], colours[1], (y * 256 / horizon.max(1)) as u32);
            canvas.span(0, y, canvas.width).fill(mixed);
        }
        let travel = self.frame as f32 * 0.05;
        for y in horizon..canvas.height {
            let up = (height / 2.0 - (y as f32 + 0.5)) / scale;
            let (rise, ahead) = (up * cos_pitch - sin_pitch, up * sin_pitch + cos_pitch);
            // Level and rising rays meet the floor nowhere: the far haze.
            let reach = if rise < -0.005 { self.height / -rise } else { 1000.0 };
            let far = ((reach - 6.0) * 6.0).clamp(0.0, 256.0) as u32;
            let (light, dark) = (mix(colours[2], colours[1], far), mix(colours[3], colours[1], far));
            if far == 256 {
                canvas.span(0, y, canvas.width).fill(colours[1]);
                continue;
            }
            // World position of the row's left end and its change per pixel, in 1/65536 of a tile.
            let step = reach / scale;
            let (left, depth) = (-width / 2.0 * step, ahead * reach);
            let tile = |value: f32| (value * 65536.0) as i64 as i32;
            let mut u = tile(eye[0] + left * cos_angle - depth * sin_angle);
            let mut v = tile(eye[2] + left * sin_angle + depth * cos_angle + travel);
            let (du, dv) = (tile(step * cos_angle), tile(step * sin_angle));
            for pixel in canvas.span(0, y, canvas.width) {
                *pixel = if (u ^ v) & 0x1_0000 == 0 { light } else { dark };
                u = u.wrapping_add(du);
                v = v.wrapping_add(dv);
            }
        }

        let mut faces = std::mem::take(&mut self.faces);
        faces.clear();
        let time = self.frame as f32;
        for (index, solid) in self.solids.iter().enumerate() {
            let lift = if index == 0 { self.jump_height } else { (time * 0.03 + index as f32).sin() * 0.25 };
            let turned: Vec<Vector> = solid
                .points
                .iter()
                .map(|point| {
                    let [x, y, z] = rotate(*point, solid.spin, time);
                    [x + solid.place[0], y + solid.place[1] + lift, z + solid.place[2]]
                })
                .collect();
            let seen: Vec<Vector> = turned.iter().map(|point| to_view(*point)).collect();
            for face in &solid.faces {
                let [a, b, c] = [turned[face[0]], turned[face[1]], turned[face[2]]];
                let normal = unit(cross(minus(b, a), minus(c, a)));
                if dot(normal, minus(eye, a)) <= 0.0 || face.iter().any(|corner| seen[*corner][2] < 0.5) {
                    continue;
                }
                let light = (dot(normal, [0.45, 0.80, -0.40]).max(0.0) * 200.0) as u32 + 56;
                let place = |corner: &usize| {
                    let [x, y, z] = seen[*corner];
                    (width / 2.0 + x / z * scale, height / 2.0 - y / z * scale)
                };
                faces.push(Face {
                    depth: face.iter().map(|corner| seen[*corner][2]).sum::<f32>() / face.len() as f32,
                    corners: face.iter().map(place).collect(),
                    colour: mix(0, colours[4 + solid.colour], light),
                });
            }
        }
        faces.sort_by(|a, b| b.depth.total_cmp(&a.depth));
        for face in &faces {
            fill_convex(canvas, &face.corners, face.colour);
        }
        self.faces = faces;
        canvas.all()
    }
}

/// Fills a convex polygon.
fn fill_convex(canvas: &mut Canvas<'_>, corners: &[(f32, f32)], colour: u32) {
    let top = corners.iter().map(|corner| corner.1).fold(f32::MAX, f32::min).max(0.0) as usize;
    let bottom = corners.iter().map(|corner| corner.1).fold(0.0, f32::max).min(canvas.height as f32) as usize;
    for y in top..bottom {
        let line = y as f32 + 0.5;
        let (mut left, mut right) = (f32::MAX, f32::MIN);
        for (index, from) in corners.iter().enumerate() {
            let to = corners[(index + 1) % corners.len()];
            if (from.1 <= line) != (to.1 <= line) {
                let x = from.0 + (line - from.1) / (to.1 - from.1) * (to.0 - from.0);
                left = left.min(x);
                right = right.max(x);
            }
        }
        let (left, right) = (left.max(0.0), right.min(canvas.width as f32));
        if left < right {
            let (left, right) = (left as usize, right as usize);
            canvas.span(left, y, right - left).fill(colour);
        }
    }
}

/// `a` at 0, `b` at 256.
fn mix(a: u32, b: u32, share: u32) -> u32 {
    let share = share.min(256);
    [16, 8, 0]
        .into_iter()
        .map(|shift| ((((a >> shift) & 0xff) * (256 - share) + ((b >> shift) & 0xff) * share) >> 8) << shift)
        .sum()
}

fn cross(a: Vector, b: Vector) -> Vector {
    [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
}

fn dot(a: Vector, b: Vector) -> f32 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

fn minus(a: Vector, b: Vector) -> Vector {
    [a[0] - b[0], a[1] - b[1], a[2] - b[2]]
}

fn unit(a: Vector) -> Vector {
    let length = dot(a, a).sqrt().max(f32::MIN_POSITIVE);
    a.map(|part| part / length)
}

fn rotate([x, y, z]: Vector, spin: Vector, time: f32) -> Vector {
    let (s, c) = (spin[0] * time).sin_cos();
    let [x, y, z] = [x, y * c - z * s, y * s + z * c];
    let (s, c) = (spin[1] * time).sin_cos();
    let [x, y, z] = [x * c + z * s, y, z * c - x * s];
    let (s, c) = (spin[2] * time).sin_cos();
    [x * c - y * s, x * s + y * c, z]
}

/// Turns every face so that it is seen anticlockwise from outside, for solids around the origin whose faces
/// look away from `inside(face)`.
fn outward(
    points: &[Vector],
    mut faces: Vec<Vec<usize>>,
    inside: impl Fn(Vector) -> Vector,
) -> Vec<Vec<usize>> {
    for face in &mut faces {
        let [a, b, c] = [points[face[0]], points[face[1]], points[face[2]]];
        let count = face.len() as f32;
        let middle = face.iter().fold([0.0; 3], |sum: Vector, corner| {
            std::array::from_fn(|axis| sum[axis] + points[*corner][axis] / count)
        });
        if dot(cross(minus(b, a), minus(c, a)), minus(middle, inside(middle))) < 0.0 {
            face.reverse();
        }
    }
    faces
}

fn cube() -> Solid {
    let points: Vec<Vector> =
        (0..8).map(|bits| [0, 1, 2].map(|axis| if (bits >> axis) & 1 == 1 { 0.8 } else { -0.8 })).collect();
    let faces = vec![
        vec![0, 1, 3, 2],
        vec![4, 5, 7, 6],
        vec![0, 1, 5, 4],
        vec![2, 3, 7, 6],
        vec![0, 2, 6, 4],
        vec![1, 3, 7, 5],
    ];
    let faces = outward(&points, faces, |_| [0.0; 3]);
    Solid { points, faces, place: [0.0, 1.3, 0.0], spin: [0.011, 0.017, 0.005], colour: 0 }
}

fn octahedron() -> Solid {
    let points: Vec<Vector> = vec![
        [1.1, 0.0, 0.0],
        [-1.1, 0.0, 0.0],
        [0.0, 1.1, 0.0],
        [0.0, -1.1, 0.0],
        [0.0, 0.0, 1.1],
        [0.0, 0.0, -1.1],
    ];
    let faces = (0..8).map(|bits| vec![bits & 1, 2 + ((bits >> 1) & 1), 4 + ((bits >> 2) & 1)]).collect();
    let faces = outward(&points, faces, |_| [0.0; 3]);
    Solid { points, faces, place: [3.0, 1.4, 1.2], spin: [0.0, 0.03, 0.012], colour: 1 }
}

fn torus() -> Solid {
    const AROUND: usize = 18;
    const TUBE: usize = 9;
    const RING: f32 = 0.95;
    let turn = |index: usize, count: usize| index as f32 * std::f32::consts::TAU / count as f32;
    let mut points = Vec::new();
    let mut faces = Vec::new();
    for ring in 0..AROUND {
        let (s, c) = turn(ring, AROUND).sin_cos();
        for tube in 0..TUBE {
            let (rise, out) = turn(tube, TUBE).sin_cos();
            let radius = RING + out * 0.4;
            points.push([c * radius, s * radius, rise * 0.4]);
            let (next_ring, next_tube) = ((ring + 1) % AROUND, (tube + 1) % TUBE);
            faces.push(vec![
                ring * TUBE + tube,
                next_ring * TUBE + tube,
                next_ring * TUBE + next_tube,
                ring * TUBE + next_tube,
            ]);
        }
    }
    let centre = |middle: Vector| {
        let flat = unit([middle[0], middle[1], 0.0]);
        [flat[0] * RING, flat[1] * RING, 0.0]
    };
    let faces = outward(&points, faces, centre);
    Solid { points, faces, place: [-3.0, 1.5, -0.6], spin: [0.02, 0.013, 0.0], colour: 2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_is_painted_whole_and_frames_differ() {
        for (width, height) in [(1280, 720), (2, 2), (33, 1000), (1000, 34)] {
            let mut scene = Scene::default();
            let mut controls = Controls { turn: 0.02, rise: 0.05, jump: true, palette: 0 };
            let mut last = Vec::new();
            for frame in 0..40 {
                let mut pixels = vec![u32::MAX; width * height];
                scene.step(&mut controls);
                let mut canvas = Canvas { pixels: &mut pixels, width, height, fresh: frame == 0 };
                let damage = scene.draw(&mut canvas, frame / 10);
                assert_eq!((damage.width, damage.height), (width, height));
                assert!(!pixels.contains(&u32::MAX), "{width}x{height} frame {frame} has holes");
                assert!(width < 100 || height < 100 || pixels != last, "frame {frame} repeats");
                last = pixels;
            }
        }
    }

    #[test]
    fn faces_look_outward_so_that_the_far_side_is_hidden() {
        for solid in [cube(), octahedron()] {
            for face in &solid.faces {
                let [a, b, c] = [0, 1, 2].map(|corner| solid.points[face[corner]]);
                assert!(dot(cross(minus(b, a), minus(c, a)), a) > 0.0);
            }
        }
    }
}
