//! The description of the API as OpenAPI 3.1: schemas come from the types that are really read and written
//! (`fanlight_api::gateway`), operations from the table here. A test holds the table against the routes, and another the
//! file under `docs/reference/api` against what this makes.

use std::collections::BTreeMap;

use fanlight_api::{envelope::ErrorDetail, gateway as wire};
use serde_json::{Map, Value, json};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, schema::Schema},
};

/// Who may call an operation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Auth {
    /// Anybody.
    None,
    /// An account, by its API token or the cookie of the page.
    Account,
    /// A token in the query that opens this alone.
    Token,
    /// Whoever reaches the unix socket.
    Socket,
}

/// What a successful answer carries.
enum Payload {
    Nothing,
    Of(Value),
    /// A list: of ids, or of objects with `recursion`.
    List(Value, Value),
}

struct Operation {
    method: &'static str,
    path: &'static str,
    id: &'static str,
    summary: &'static str,
    auth: Auth,
    query: &'static [&'static str],
    body: Option<(Value, bool)>,
    ok: Vec<(u16, Payload)>,
    errors: &'static [u16],
}

/// Parameters of queries: type, and what they are for. Texts of flags and numbers are checked by the handlers, so that
/// wrong ones get an error by name.
fn parameter(name: &str) -> Value {
    let (schema, description) = match name {
        "recursion" => (json!({"type": "boolean"}), "Objects instead of ids; `recursive` is the same."),
        "limit" => (
            json!({"type": "integer", "minimum": 0, "maximum": 9_007_199_254_740_991_i64}),
            "Most objects of the answer; 0: all.",
        ),
        "offset" => (
            json!({"type": "integer", "minimum": 0, "maximum": 9_007_199_254_740_991_i64}),
            "Objects to leave out first.",
        ),
        "status" => (
            json!({"type": "string", "enum": ["created", "active", "error", "terminating", "terminated"]}),
            "Only sessions with this status.",
        ),
        "sort_by" => (
            json!({"type": "string", "enum": ["id", "app", "region", "status", "container_id"]}),
            "Order of the list.",
        ),
        "sort_order" => (json!({"type": "string", "enum": ["asc", "desc"]}), "Default: asc."),
        "force" => (
            json!({"type": "boolean"}),
            "Also when the agent cannot be reached; an instance may be left until it can.",
        ),
        "sync" => (json!({"type": "boolean"}), "Answer when it has ended; default: at once."),
        "session_id" => (json!({"type": "string", "minLength": 1}), "Only shares of this session."),
        "type" => (json!({"type": "string", "enum": ["adb"]}), "Kind of the share."),
        _ => (json!({"type": "string"}), "The token of the URL."),
    };
    let required = matches!(name, "type" | "token");
    json!({"name": name, "in": "query", "required": required, "schema": schema, "description": description})
}

/// Collects schemas under their names.
#[derive(Default)]
struct Schemas(BTreeMap<String, Value>);

impl Schemas {
    fn of<T: ToSchema + PartialSchema>(&mut self) -> Value {
        let mut all: Vec<(String, RefOr<Schema>)> = vec![(T::name().into_owned(), T::schema())];
        T::schemas(&mut all);
        for (name, schema) in all {
            self.0.insert(name, serde_json::to_value(schema).unwrap_or_default());
        }
        json!({"$ref": format!("#/components/schemas/{}", T::name())})
    }
}

fn list(items: Value) -> Value {
    json!({"type": "array", "items": items})
}

fn operations(schemas: &mut Schemas) -> Vec<Operation> {
    let operation = |method, path, id, summary, auth| Operation {
        method,
        path,
        id,
        summary,
        auth,
        query: &[],
        body: None,
        ok: Vec::new(),
        errors: &[],
    };
    let ids = list(json!({"type": "string"}));
    let any = json!({"type": "object"});
    vec![
        Operation {
            ok: vec![(200, Payload::Of(any.clone()))],
            ..operation(
                "get",
                "/1.0",
                "describe",
                "Version, extensions, and whether the caller is trusted.",
                Auth::None,
            )
        },
        Operation {
            ok: vec![(200, Payload::Of(schemas.of::<wire::ServiceStatus>()))],
            errors: &[503],
            ..operation(
                "get",
                "/1.0/status",
                "get_service_status",
                "Health; counts for trusted callers.",
                Auth::None,
            )
        },
        Operation {
            ok: vec![(200, Payload::Of(list(schemas.of::<wire::Application>())))],
            ..operation(
                "get",
                "/1.0/applications",
                "get_applications",
                "What can be streamed.",
                Auth::Account,
            )
        },
        Operation {
            query: &["recursion"],
            ok: vec![(200, Payload::Of(list(schemas.of::<wire::Region>())))],
            errors: &[400],
            ..operation(
                "get",
                "/1.0/regions",
                "get_regions",
                "Regions with a live agent; with `recursion` also how to measure the way there.",
                Auth::Account,
            )
        },
        Operation {
            query: &["status", "recursion", "limit", "offset", "sort_by", "sort_order"],
            ok: vec![(200, Payload::List(ids.clone(), list(schemas.of::<wire::Session>())))],
            errors: &[400],
            ..operation(
                "get",
                "/1.0/sessions",
                "get_sessions",
                "Sessions that the caller may see.",
                Auth::Account,
            )
        },
        Operation {
            body: Some((schemas.of::<wire::SessionsPost>(), true)),
            ok: vec![(201, Payload::Of(schemas.of::<wire::SessionCreated>()))],
            errors: &[400, 404, 409, 429],
            ..operation(
                "post",
                "/1.0/sessions",
                "create_new_session",
                "Creates and starts a session. The header `Idempotency-Key` makes repeating it safe.",
                Auth::Account,
            )
        },
        Operation {
            query: &["force", "sync"],
            body: Some((schemas.of::<wire::SessionsDelete>(), true)),
            ok: [200, 202, 207].map(|code| (code, Payload::Of(schemas.of::<wire::SessionsDeleted>()))).into(),
            errors: &[400, 404],
            ..operation("delete", "/1.0/sessions", "delete_sessions", "Ends several sessions.", Auth::Account)
        },
        Operation {
            ok: vec![(200, Payload::Of(schemas.of::<wire::Session>()))],
            errors: &[400, 404],
            ..operation("get", "/1.0/sessions/{id}", "get_session", "One session.", Auth::Account)
        },
        Operation {
            query: &["force", "sync"],
            ok: vec![(200, Payload::Nothing)],
            errors: &[400, 404],
            ..operation("delete", "/1.0/sessions/{id}", "delete_session", "Ends a session.", Auth::Account)
        },
        Operation {
            body: Some((schemas.of::<wire::JoinPost>(), false)),
            ok: vec![(200, Payload::Of(schemas.of::<wire::SessionJoined>()))],
            errors: &[400, 404, 503],
            ..operation(
                "post",
                "/1.0/sessions/{id}/join",
                "join_session",
                "A socket for another client; the present one is disconnected when it connects.",
                Auth::Account,
            )
        },
        Operation {
            body: Some((schemas.of::<wire::SharePost>(), true)),
            ok: vec![(200, Payload::Of(schemas.of::<wire::ShareCreated>()))],
            errors: &[400, 403, 404],
            ..operation(
                "post",
                "/1.0/sessions/{id}/share",
                "share_session",
                "Makes a pre-signed URL that opens the session for somebody without a token.",
                Auth::Account,
            )
        },
        Operation {
            query: &["type", "token"],
            ok: vec![(200, Payload::Of(schemas.of::<wire::ShareConnected>()))],
            errors: &[400, 401, 403, 404],
            ..operation(
                "get",
                "/1.0/sessions/{id}/connect",
                "connect_session",
                "Exchanges the token of a share for a socket.",
                Auth::Token,
            )
        },
        Operation {
            query: &["token"],
            ok: vec![(101, Payload::Nothing)],
            errors: &[400, 401, 403, 404, 410, 426, 503],
            ..operation(
                "get",
                "/1.0/sessions/{id}/sockets/{role}",
                "streaming_websocket",
                "Signalling websocket; also under `/1.0/session/…`.",
                Auth::Token,
            )
        },
        Operation {
            query: &["recursion", "limit", "offset", "session_id"],
            ok: vec![(200, Payload::List(ids.clone(), list(schemas.of::<wire::ShareBase>())))],
            errors: &[400, 403],
            ..operation("get", "/1.0/shares", "get_shares", "Shares, without their URLs.", Auth::Account)
        },
        Operation {
            ok: vec![(200, Payload::Of(schemas.of::<wire::Share>()))],
            errors: &[400, 403, 404],
            ..operation("get", "/1.0/shares/{id}", "get_share", "One share with its URL.", Auth::Account)
        },
        Operation {
            body: Some((schemas.of::<wire::SharePatch>(), true)),
            ok: vec![(200, Payload::Of(schemas.of::<wire::Share>()))],
            errors: &[400, 403, 404],
            ..operation(
                "patch",
                "/1.0/shares/{id}",
                "update_share",
                "Changes description or expiry.",
                Auth::Account,
            )
        },
        Operation {
            query: &["sync"],
            ok: vec![(200, Payload::Nothing)],
            errors: &[400, 403, 404],
            ..operation(
                "delete",
                "/1.0/shares/{id}",
                "delete_share",
                "Makes a share worthless at once.",
                Auth::Account,
            )
        },
        Operation {
            ok: vec![(200, Payload::Of(schemas.of::<wire::ConfigItems>()))],
            errors: &[403],
            ..operation(
                "get",
                "/1.0/config",
                "get_config",
                "Items that may be changed while gateways run.",
                Auth::Account,
            )
        },
        Operation {
            body: Some((schemas.of::<wire::ConfigPatch>(), true)),
            ok: vec![(200, Payload::Nothing)],
            errors: &[400, 403],
            ..operation(
                "patch",
                "/1.0/config",
                "update_config",
                "Changes one item, for all units.",
                Auth::Account,
            )
        },
        Operation {
            ok: vec![(200, Payload::Of(schemas.of::<wire::Diagnosis>()))],
            ..operation(
                "get",
                "/1.0/doctor",
                "diagnose",
                "What the gateway sees of the path that a stream takes.",
                Auth::Account,
            )
        },
        Operation {
            ok: vec![(200, Payload::Of(list(schemas.of::<wire::Account>())))],
            ..operation("get", "/1.0/accounts", "get_accounts", "Accounts.", Auth::Socket)
        },
        Operation {
            body: Some((schemas.of::<wire::AccountsPost>(), true)),
            ok: vec![(201, Payload::Of(schemas.of::<wire::AccountCreated>()))],
            errors: &[400, 409],
            ..operation(
                "post",
                "/1.0/accounts",
                "create_account",
                "Makes an account; the answer shows its token, this once.",
                Auth::Socket,
            )
        },
        Operation {
            ok: vec![(200, Payload::Nothing)],
            errors: &[404],
            ..operation(
                "delete",
                "/1.0/accounts/{name}",
                "delete_account",
                "Deletes an account; its token stops working at once.",
                Auth::Socket,
            )
        },
        Operation {
            ok: vec![(201, Payload::Of(schemas.of::<wire::LoginCode>()))],
            ..operation(
                "post",
                "/1.0/ui/codes",
                "create_login_code",
                "A one-time code for the page.",
                Auth::Socket,
            )
        },
        Operation {
            ok: vec![(200, Payload::Nothing)],
            ..operation("get", "/1.0/swagger.json", "get_description", "This description.", Auth::Socket)
        },
    ]
}

fn envelope(code: u16, payload: &Payload) -> Value {
    let kind = if code == 202 { "async" } else { "sync" };
    let mut properties = json!({
        "type": {"const": kind},
        "status": {"const": "success"},
        "status_code": {"const": code},
    });
    let mut required = vec!["type", "status", "status_code"];
    match payload {
        Payload::Nothing => {}
        Payload::Of(schema) => {
            properties["metadata"] = schema.clone();
            required.push("metadata");
        }
        Payload::List(ids, objects) => {
            properties["metadata"] = json!({"anyOf": [ids, objects]});
            properties["total_size"] = json!({"type": "integer", "minimum": 0});
            required.extend(["metadata", "total_size"]);
        }
    }
    json!({"type": "object", "properties": properties, "required": required})
}

fn meaning(code: u16) -> &'static str {
    match code {
        101 => "The socket is open.",
        200 => "Done.",
        201 => "Made.",
        202 => "Accepted; work goes on.",
        207 => "Some could not be ended.",
        400 => "The request is wrong; the text names what.",
        401 => "No valid token.",
        403 => "A valid token that does not open this, or a limit.",
        404 => "Not there, or nobody can take it.",
        409 => "Contradicts something that was done before.",
        410 => "It has ended, or a newer client came.",
        426 => "Not a websocket.",
        429 => "Too many requests.",
        _ => "Not possible now; try again.",
    }
}

fn describe(operation: &Operation) -> Value {
    let json_content = |schema: Value| json!({"application/json": {"schema": schema}});
    let mut responses = Map::new();
    for (code, payload) in &operation.ok {
        let mut response = json!({"description": meaning(*code)});
        let bare = operation.id == "get_description";
        if *code != 101 {
            let schema = if bare { json!({"type": "object"}) } else { envelope(*code, payload) };
            response["content"] = json_content(schema);
        }
        responses.insert(code.to_string(), response);
    }
    let error = json_content(json!({"$ref": "#/components/schemas/Error"}));
    let mut errors: Vec<u16> = operation.errors.to_vec();
    if matches!(operation.auth, Auth::Account) {
        errors.push(401);
    }
    for code in errors {
        responses.insert(code.to_string(), json!({"description": meaning(code), "content": error}));
    }
    responses.insert("default".into(), json!({"description": "Any other failure.", "content": error}));
    let mut parameters: Vec<Value> = operation.query.iter().map(|name| parameter(name)).collect();
    for part in operation.path.split('/') {
        if let Some(name) = part.strip_prefix('{').and_then(|part| part.strip_suffix('}')) {
            let schema = match name {
                "role" => json!({"type": "string", "enum": ["slave", "adb", "master"]}),
                _ => {
                    json!({"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[A-Za-z0-9_:.-]+$"})
                }
            };
            parameters.push(json!({"name": name, "in": "path", "required": true, "schema": schema}));
        }
    }
    if operation.id == "create_new_session" {
        parameters.push(json!({
            "name": "Idempotency-Key", "in": "header", "required": false,
            "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
            "description": "The same key with the same body is the same session, for a day.",
        }));
    }
    let security = match operation.auth {
        Auth::Account => json!([{"token": []}, {"query": []}]),
        Auth::None | Auth::Token | Auth::Socket => json!([]),
    };
    let mut described = json!({
        "operationId": operation.id,
        "summary": operation.summary,
        "tags": [if operation.auth == Auth::Socket { "internal" } else { "public" }],
        "parameters": parameters,
        "security": security,
        "responses": responses,
    });
    if let Some((schema, required)) = &operation.body {
        described["requestBody"] = json!({"required": required, "content": json_content(schema.clone())});
    }
    described
}

/// The description; `internal`: with what only the unix socket offers.
pub fn openapi(internal: bool) -> Value {
    let mut schemas = Schemas::default();
    let operations = operations(&mut schemas);
    let detail = schemas.of::<ErrorDetail>();
    schemas.0.insert(
        "Error".into(),
        json!({
            "type": "object",
            "properties": {
                "type": {"const": "error"},
                "status": {"const": "failed"},
                "status_code": {"type": "integer", "minimum": 400, "maximum": 599},
                "error": {"type": "string"},
                "metadata": detail,
            },
            "required": ["type", "status", "status_code", "error"],
        }),
    );
    let mut paths = Map::new();
    for operation in operations.iter().filter(|operation| internal || operation.auth != Auth::Socket) {
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method] = describe(operation);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Fanlight stream gateway",
            "version": "1.0",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas.0,
            "securitySchemes": {
                "token": {
                    "type": "apiKey", "in": "header", "name": "Authorization",
                    "description": "`macaroon root=TOKEN` with the token of an account.",
                },
                "query": {
                    "type": "apiKey", "in": "query", "name": "api_token",
                    "description": "The same token in the query.",
                },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_leads_to_a_schema_and_every_operation_has_its_own_id() {
        let document = openapi(true);
        let text = document.to_string();
        for part in text.split("\"$ref\":\"#/components/schemas/").skip(1) {
            let name = part.split('"').next().expect("a name");
            assert!(document["components"]["schemas"].get(name).is_some(), "{name}");
        }
        let mut ids: Vec<&str> = Vec::new();
        for path in document["paths"].as_object().expect("paths").values() {
            for operation in path.as_object().expect("operations").values() {
                ids.push(operation["operationId"].as_str().expect("id"));
            }
        }
        let count = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), count);
        assert!(openapi(false)["paths"].get("/1.0/accounts").is_none());
    }
}
