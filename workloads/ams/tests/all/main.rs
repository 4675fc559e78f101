//! AMS as a whole: the engines against their contract, the walls between instances, the API over TLS, and what is
//! left after a kill -9.

mod addons;
mod adoption;
mod api;
mod auth;
mod bounds;
mod contract;
mod engines;
mod exec;
mod images;
mod nodes;
mod pool;
mod settings;
mod stack;
mod units;
mod walls;
