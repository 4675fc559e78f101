//! Bodies of the AMS REST API (ams-api).
