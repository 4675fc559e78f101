//! The program inside every instance: it is the display of the application, encodes what it shows, and speaks
//! with the client.
//!
//! [`compositor`] is the display, [`encode`] makes coded pictures of it, `media` owns the one UDP port and the
//! peer, `session` decides who may have the stream and when nobody is left, `audio` and `app` look after the
//! sound server and the application, [`claim`] brings the session to an instance that waited for one, `agent` keeps
//! the way to the rest of Fanlight, and [`run`] puts them together; [`x11_on_demand`] keeps Xwayland away until it is
//! needed; [`supervisor`] starts all of it inside a container. What an instance may see of its host, and who starts it,
//! is left to the instance engine.

mod agent;
mod app;
mod audio;
pub mod claim;
pub mod compositor;
pub mod config;
pub mod encode;
pub mod guest;
mod media;
mod notify;
mod run;
mod session;
pub mod supervisor;
pub mod x11_on_demand;

pub use config::Config;
pub use run::run;
