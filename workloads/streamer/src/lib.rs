pub mod compositor;
pub mod encode;
