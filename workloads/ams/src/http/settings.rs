//! The settings of AMS (ams-api section 13).

use axum::{extract::State, response::Response};
use fanlight_api::ams::auth::ConfigPatch;
use fanlight_service::{ApiError, http::Json};
use serde_json::json;

use super::{accepted, object, store_error};
use crate::{
    Ams,
    settings::{SettingError, words},
};

pub(super) async fn show(State(ams): State<Ams>) -> Response {
    object(json!({"config": ams.settings.show(&ams.config, &ams.address.to_string())}))
}

pub(super) async fn change(
    State(ams): State<Ams>,
    Json(patch): Json<ConfigPatch>,
) -> Result<Response, ApiError> {
    if patch.name == "application.addons" && !patch.value.is_empty() {
        if !ams.engine.has_images() {
            let text =
                "config item application.addons not supported: instances run the programs of this machine";
            return Err(ApiError::bad_request("not-supported", text));
        }
        // Named now, not when the next application is made.
        ams.addons.resolve(&words(patch.value.expose())).await?;
    }
    Ok(accepted(&ams.settings.set(&patch.name, &patch.value).await?))
}

impl From<SettingError> for ApiError {
    fn from(error: SettingError) -> Self {
        use SettingError as E;
        let text = error.to_string();
        match error {
            E::Unknown(_) => Self::not_found("setting-not-found", text),
            E::Refused { .. } => Self::bad_request("not-supported", text),
            E::ReadOnly { .. } => Self::bad_request("read-only", text),
            E::Value { .. } => Self::bad_request("invalid-argument", text),
            E::Hash(_) => Self::internal(error),
            E::Store(error) => store_error(error),
        }
    }
}
