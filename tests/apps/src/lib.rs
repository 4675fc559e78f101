//! Applications that tests and benches stream: a pattern whose pixels can be read back, a small 3D scene
//! with sound, and a probe that tries to break out. Here is what the programs share: a shared-memory
//! Wayland window, the barcode, and sound. They know nothing of the rest of Fanlight, as a user's
//! application would not.

pub mod barcode;
pub mod canvas;
pub mod scene;
pub mod sound;
pub mod window;
