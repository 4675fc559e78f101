//! Routes for whoever runs gateways: items of configuration, the diagnosis, accounts, and the description of the API.

use axum::extract::{Path, State};
use fanlight_api::gateway::{AccountsPost, ConfigItems, ConfigPatch, Diagnosis};
use fanlight_service::{ApiError, http::Json};
use serde_json::{Value, json};

use super::{Answer, Full, openapi};
use crate::{
    Gateway,
    accounts::Caller,
    sessions::store_error,
    settings::{self, SettingError},
};

pub async fn get_config(State(gateway): State<Gateway>, _: Full) -> Answer<ConfigItems> {
    Answer::ok(ConfigItems { config: gateway.settings().show() })
}

pub async fn update_config(
    State(gateway): State<Gateway>,
    Full(caller): Full,
    Json(request): Json<ConfigPatch>,
) -> Result<Answer<Value>, ApiError> {
    settings::check(&request.name, &request.value).map_err(|error| {
        let code = match error {
            SettingError::Unknown { .. } => "unknown-item",
            SettingError::Value { .. } => "invalid-value",
        };
        ApiError::bad_request(code, error.to_string())
    })?;
    gateway.change_setting(&request.name, &request.value).await.map_err(store_error)?;
    tracing::info!(account = caller.account, "config item {} is now {:?}", request.name, request.value);
    Ok(Answer::empty())
}

pub async fn doctor(State(gateway): State<Gateway>, _: Caller) -> Answer<Diagnosis> {
    gateway.first_reports().await;
    Answer::ok(gateway.diagnose().await)
}

/// The description itself, without an envelope, as tools expect it.
pub async fn description() -> Json<Value> {
    Json(openapi::openapi(true))
}

pub async fn accounts(State(gateway): State<Gateway>, _: Caller) -> Result<Answer<Value>, ApiError> {
    let accounts = gateway.accounts.list().await?;
    Ok(Answer { total_size: Some(accounts.len() as u64), ..Answer::ok(json!(accounts)) })
}

pub async fn create_account(
    State(gateway): State<Gateway>,
    _: Caller,
    Json(request): Json<AccountsPost>,
) -> Result<Answer<Value>, ApiError> {
    let days = i64::from(gateway.settings().token_days);
    let lifetime = (days > 0).then_some(days * 86_400);
    let created = gateway.accounts.create(&request, gateway.now(), lifetime).await?;
    tracing::info!(account = created.name, "account {} was created", created.name);
    Ok(Answer::created(json!(created)))
}

pub async fn delete_account(
    State(gateway): State<Gateway>,
    _: Caller,
    Path(name): Path<String>,
) -> Result<Answer<Value>, ApiError> {
    gateway.accounts.delete(&name).await?;
    tracing::info!(account = name, "account {name} was deleted");
    Ok(Answer::empty())
}

pub async fn login_code(State(gateway): State<Gateway>, _: Caller) -> Result<Answer<Value>, ApiError> {
    let code = gateway.accounts.login_code(gateway.now()).await?;
    Ok(Answer::created(json!(code)))
}
