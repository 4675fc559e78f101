//! AMS as a whole: the engines against their contract, the walls between instances, the API over TLS, and what is
//! left after a kill -9.

mod adoption;
mod api;
mod engines;
mod stack;
mod walls;
