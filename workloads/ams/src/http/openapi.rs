//! The description of the API as OpenAPI 3.1: methods, paths, queries, kinds of bodies and answers, and who may ask, from the
//! table here and the one of rights (`access`). Tests hold it against the router and against the file under
//! `docs/reference/api`. What requests carry is described from the types that are read; the members of answers are left to
//! `fanlight_api::ams`.

use fanlight_api::ams::{
    ApplicationPatch, ApplicationVersionPatch, CertificatesPost, Delete, DeleteMany, InstancePatch,
    InstancesPost, SharePost,
    auth::{ConfigPatch, GroupPut, GroupsPost, IdentitiesPost, IdentityPut},
    exec::ExecPost,
    images::{ImagePatch, ImagesPost},
    nodes::{NodeDelete, NodePatch, NodesPost},
};
use fanlight_api::gateway::SharePatch;
use serde_json::{Map, Value, json};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema},
};

use super::access::{Need, ROUTES};

/// What a request carries.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Body {
    Nothing,
    /// An object, which must be there.
    Object,
    /// An object, or nothing.
    Optional,
    /// A file, and no JSON in its place.
    File,
    /// A file, or an object in its place.
    FileOrObject,
}

/// What a successful answer carries.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// A result.
    Sync,
    /// An object with the tag of its content.
    Tagged,
    /// URLs, or objects with `recursion=1`.
    List,
    /// An operation that goes on.
    Operation,
    /// An object at once, with the status of accepted work.
    Cancelled,
    /// Bytes of a file.
    Bytes,
    /// Lines of text.
    Text,
    /// A websocket.
    Socket,
}

struct Described {
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    query: &'static [&'static str],
    body: Body,
    answer: Answer,
}

const fn described(
    method: &'static str,
    path: &'static str,
    query: &'static [&'static str],
    body: Body,
    answer: Answer,
    summary: &'static str,
) -> Described {
    Described { method, path, summary, query, body, answer }
}

const LISTING: &[&str] = &["recursion", "offset", "limit", "entitlements"];

const OPERATIONS: &[Described] = {
    use Answer::{Bytes, Cancelled, List, Operation, Socket, Sync, Tagged, Text};
    use Body::{File, FileOrObject, Nothing, Object, Optional};
    let seen: &[&str] = &["entitlements"];
    &[
        described("GET", "/", &[], Nothing, Sync, "Versions of the API."),
        described(
            "GET",
            "/1.0",
            &[],
            Nothing,
            Sync,
            "Extensions, ways to log in, and whether the caller is trusted.",
        ),
        described("GET", "/1.0/version", &[], Nothing, Sync, "The version of the server."),
        described("GET", "/1.0/config", &[], Nothing, Tagged, "The settings."),
        described("PATCH", "/1.0/config", &[], Object, Operation, "Changes one setting."),
        described("GET", "/1.0/events", &["type"], Nothing, Socket, "Events as they happen."),
        described(
            "POST",
            "/1.0/events/auth",
            &[],
            Nothing,
            Sync,
            "A token that opens the events for a short time.",
        ),
        described("GET", "/1.0/operations", LISTING, Nothing, Sync, "Operations by their status."),
        described("GET", "/1.0/operations/{id}", &[], Nothing, Sync, "One operation."),
        described("DELETE", "/1.0/operations/{id}", &[], Nothing, Cancelled, "Cancels an operation."),
        described(
            "GET",
            "/1.0/operations/{id}/wait",
            &["timeout"],
            Nothing,
            Sync,
            "Answers when the operation has ended.",
        ),
        described(
            "GET",
            "/1.0/operations/{id}/websocket",
            &["secret"],
            Nothing,
            Socket,
            "One stream of a program that runs in an instance.",
        ),
        described("GET", "/1.0/certificates", LISTING, Nothing, List, "Trusted certificates."),
        described("POST", "/1.0/certificates", &[], Object, Operation, "Trusts a certificate."),
        described("GET", "/1.0/certificates/{fingerprint}", &[], Nothing, Tagged, "One certificate."),
        described(
            "DELETE",
            "/1.0/certificates/{fingerprint}",
            &[],
            Nothing,
            Operation,
            "Trusts a certificate no more.",
        ),
        described(
            "GET",
            "/1.0/auth/oidc",
            &["grant_type"],
            Nothing,
            Sync,
            "How to log in with the provider.",
        ),
        described("GET", "/1.0/auth/permissions", &[], Nothing, Sync, "What the caller may do."),
        described(
            "GET",
            "/1.0/auth/identities",
            &["recursion", "offset", "limit", "entitlements", "id", "auth_type", "name"],
            Nothing,
            List,
            "Identities.",
        ),
        described("POST", "/1.0/auth/identities", &[], Object, Operation, "Makes an identity."),
        described("GET", "/1.0/auth/identities/{id}", seen, Nothing, Tagged, "One identity."),
        described(
            "PUT",
            "/1.0/auth/identities/{id}",
            &[],
            Object,
            Operation,
            "Sets the groups of an identity.",
        ),
        described("DELETE", "/1.0/auth/identities/{id}", &[], Optional, Operation, "Removes an identity."),
        described(
            "GET",
            "/1.0/auth/groups",
            &["recursion", "offset", "limit", "entitlements", "id", "auth_type", "name"],
            Nothing,
            List,
            "Groups.",
        ),
        described("POST", "/1.0/auth/groups", &[], Object, Operation, "Makes a group."),
        described("GET", "/1.0/auth/groups/{name}", seen, Nothing, Tagged, "One group."),
        described(
            "PUT",
            "/1.0/auth/groups/{name}",
            &[],
            Object,
            Operation,
            "Sets description and permissions of a group.",
        ),
        described("DELETE", "/1.0/auth/groups/{name}", &[], Optional, Operation, "Removes a group."),
        described("GET", "/1.0/tasks", LISTING, Nothing, Sync, "Work of the server that is going on."),
        described("GET", "/1.0/metrics", &[], Nothing, Text, "Figures for Prometheus."),
        described("GET", "/1.0/nodes", LISTING, Nothing, List, "Nodes."),
        described("POST", "/1.0/nodes", &[], Object, Operation, "Adds a node."),
        described("GET", "/1.0/nodes/{name}", seen, Nothing, Tagged, "One node."),
        described("PATCH", "/1.0/nodes/{name}", &[], Optional, Operation, "Changes a node."),
        described("DELETE", "/1.0/nodes/{name}", &[], Optional, Operation, "Removes a node."),
        described(
            "GET",
            "/1.0/images",
            &["recursion", "entitlements", "default"],
            Nothing,
            List,
            "Images; with `default=true` the default one, in full.",
        ),
        described(
            "POST",
            "/1.0/images",
            &[],
            FileOrObject,
            Operation,
            "Makes an image of a file or of an instance.",
        ),
        described("GET", "/1.0/images/{id}", &["type", "entitlements"], Nothing, Tagged, "One image."),
        described(
            "PATCH",
            "/1.0/images/{id}",
            &[],
            FileOrObject,
            Operation,
            "Adds a version, or makes the image the default.",
        ),
        described("DELETE", "/1.0/images/{id}", &[], Optional, Operation, "Removes an image."),
        described(
            "DELETE",
            "/1.0/images/{id}/{version}",
            &[],
            Nothing,
            Operation,
            "Removes a version of an image.",
        ),
        described("GET", "/1.0/addons", &["recursion", "entitlements"], Nothing, List, "Addons."),
        described("POST", "/1.0/addons", &[], File, Operation, "Makes an addon of a package."),
        described("GET", "/1.0/addons/{name}", &["entitlements"], Nothing, Tagged, "One addon."),
        described("PATCH", "/1.0/addons/{name}", &[], File, Operation, "Adds a version to an addon."),
        described("DELETE", "/1.0/addons/{name}", &[], Optional, Operation, "Removes an addon."),
        described(
            "DELETE",
            "/1.0/addons/{name}/{version}",
            &[],
            Optional,
            Operation,
            "Removes a version of an addon.",
        ),
        described(
            "GET",
            "/1.0/applications",
            &[
                "recursion",
                "offset",
                "limit",
                "entitlements",
                "id",
                "name",
                "status",
                "published",
                "tags",
                "addons",
                "inhibit_auto_updates",
            ],
            Nothing,
            List,
            "Applications.",
        ),
        described("POST", "/1.0/applications", &[], File, Operation, "Makes an application of a package."),
        described("DELETE", "/1.0/applications", &[], Object, Operation, "Removes several applications."),
        described("GET", "/1.0/applications/{id}", seen, Nothing, Tagged, "One application."),
        described(
            "PATCH",
            "/1.0/applications/{id}",
            &[],
            FileOrObject,
            Operation,
            "Adds a version, or changes the application.",
        ),
        described("DELETE", "/1.0/applications/{id}", &[], Optional, Operation, "Removes an application."),
        described(
            "GET",
            "/1.0/applications/{id}/manifest",
            &[],
            Nothing,
            Bytes,
            "The manifest of the newest version.",
        ),
        described(
            "GET",
            "/1.0/applications/{id}/{version}",
            &[],
            Nothing,
            Bytes,
            "A version as an archive; what is known of it where `Accept` is `application/json`.",
        ),
        described(
            "PATCH",
            "/1.0/applications/{id}/{version}",
            &[],
            Optional,
            Operation,
            "Publishes a version, or takes that back.",
        ),
        described(
            "DELETE",
            "/1.0/applications/{id}/{version}",
            &[],
            Optional,
            Operation,
            "Removes a version.",
        ),
        described(
            "GET",
            "/1.0/applications/{id}/{version}/manifest",
            &[],
            Nothing,
            Bytes,
            "The manifest of a version.",
        ),
        described(
            "GET",
            "/1.0/instances",
            &[
                "recursion",
                "offset",
                "limit",
                "entitlements",
                "id",
                "name",
                "base",
                "type",
                "status",
                "node",
                "app_id",
                "app_name",
                "app_version",
                "image_id",
                "image_version",
                "tags",
            ],
            Nothing,
            List,
            "Instances.",
        ),
        described("POST", "/1.0/instances", &["no_wait"], Object, Operation, "Makes an instance."),
        described("DELETE", "/1.0/instances", &[], Object, Operation, "Removes several instances."),
        described("GET", "/1.0/instances/{id}", seen, Nothing, Tagged, "One instance."),
        described(
            "PATCH",
            "/1.0/instances/{id}",
            &["no_wait"],
            Object,
            Operation,
            "Starts, stops or changes an instance.",
        ),
        described("DELETE", "/1.0/instances/{id}", &[], Optional, Operation, "Removes an instance."),
        described(
            "POST",
            "/1.0/instances/{id}/exec",
            &[],
            Object,
            Operation,
            "Runs a program in an instance.",
        ),
        described(
            "POST",
            "/1.0/instances/{id}/shares",
            &[],
            Object,
            Sync,
            "Gives a way into its session away.",
        ),
        described("PATCH", "/1.0/instances/{id}/shares/{share}", &[], Optional, Sync, "Changes a share."),
        described(
            "DELETE",
            "/1.0/instances/{id}/shares/{share}",
            &[],
            Nothing,
            Operation,
            "Takes a share away.",
        ),
        described("GET", "/1.0/instances/{id}/logs", &[], Nothing, Sync, "URLs of the logs that are kept."),
        described("GET", "/1.0/instances/{id}/logs/{name}", &[], Nothing, Bytes, "One log."),
        described(
            "GET",
            "/1.0/containers",
            &[
                "recursion",
                "offset",
                "limit",
                "entitlements",
                "id",
                "name",
                "type",
                "status",
                "node",
                "app_id",
                "app_name",
                "app_version",
                "image_id",
                "image_version",
                "tags",
            ],
            Nothing,
            List,
            "Instances in the shape that older clients know.",
        ),
        described("POST", "/1.0/containers", &["no_wait"], Object, Operation, "Makes an instance."),
        described("DELETE", "/1.0/containers", &[], Object, Operation, "Removes several instances."),
        described("GET", "/1.0/containers/{id}", seen, Nothing, Tagged, "One instance in the older shape."),
        described(
            "PATCH",
            "/1.0/containers/{id}",
            &["no_wait"],
            Object,
            Operation,
            "Starts, stops or changes an instance.",
        ),
        described("DELETE", "/1.0/containers/{id}", &[], Optional, Operation, "Removes an instance."),
        described(
            "POST",
            "/1.0/containers/{id}/exec",
            &[],
            Object,
            Operation,
            "Runs a program in an instance.",
        ),
        described("GET", "/1.0/containers/{id}/logs", &[], Nothing, Sync, "URLs of the logs that are kept."),
        described("GET", "/1.0/containers/{id}/logs/{name}", &[], Nothing, Bytes, "One log."),
    ]
};

fn parameter(name: &str) -> Value {
    let (schema, text) = match name {
        "recursion" => {
            (json!({"type": "integer", "minimum": 0, "maximum": 1}), "1: objects instead of URLs.")
        }
        "entitlements" => {
            (json!({"type": "integer", "minimum": 0, "maximum": 1}), "1: with what the caller may do.")
        }
        "offset" => (json!({"type": "integer", "minimum": 0}), "Objects to leave out first."),
        "limit" => (json!({"type": "integer"}), "Most objects of the answer; 0 and less: all."),
        "timeout" => {
            (json!({"type": "integer"}), "Seconds to wait at most; less than 0: until it has ended.")
        }
        "no_wait" => (json!({"type": "boolean"}), "The operation ends before the instance runs."),
        "default" => (json!({"type": "boolean"}), "Only the default image."),
        "base" | "published" => (json!({"type": "boolean"}), "Only objects where this is so."),
        "app_version" | "image_version" => {
            (json!({"type": "integer", "minimum": 0}), "Only objects with this version.")
        }
        "tags" => (json!({"type": "string"}), "Only objects with all of these tags, with commas between."),
        "secret" => (json!({"type": "string"}), "The secret of the stream, from the operation."),
        "grant_type" => (json!({"type": "string"}), "How the caller wants to log in."),
        _ => (json!({"type": "string"}), "Only objects where it is this."),
    };
    json!({"name": name, "in": "query", "required": name == "secret", "schema": schema, "description": text})
}

fn json_content(schema: &str) -> Value {
    json!({"application/json": {"schema": {"$ref": format!("#/components/schemas/{schema}")}}})
}

fn success(answer: Answer) -> (&'static str, Value) {
    let file = json!({"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}});
    let tag = json!({"ETag": {"schema": {"type": "string"}, "description": "The tag of the content."}});
    let location = json!({"Location": {"schema": {"type": "string"}, "description": "The operation."}});
    match answer {
        Answer::Sync => ("200", json!({"description": "A result.", "content": json_content("Sync")})),
        Answer::Tagged => {
            ("200", json!({"description": "An object.", "headers": tag, "content": json_content("Sync")}))
        }
        Answer::List => ("200", json!({"description": "A list.", "content": json_content("List")})),
        Answer::Operation => (
            "202",
            json!({"description": "It goes on.", "headers": location, "content": json_content("Async")}),
        ),
        Answer::Cancelled => ("202", json!({"description": "Accepted.", "content": json_content("Sync")})),
        Answer::Bytes => ("200", json!({"description": "A file.", "content": file})),
        Answer::Text => (
            "200",
            json!({"description": "Lines of text.", "content": {"text/plain": {"schema": {"type": "string"}}}}),
        ),
        Answer::Socket => ("101", json!({"description": "A websocket."})),
    }
}

/// Schemas of bodies, under the names of their types.
#[derive(Default)]
struct Schemas(Map<String, Value>);

impl Schemas {
    fn of<T: ToSchema + PartialSchema>(&mut self) -> Value {
        let mut all: Vec<(String, RefOr<Schema>)> = vec![(T::name().into_owned(), T::schema())];
        T::schemas(&mut all);
        for (name, schema) in all {
            self.0.insert(name, serde_json::to_value(schema).unwrap_or_default());
        }
        json!({"$ref": format!("#/components/schemas/{}", T::name())})
    }

    /// The object that a request carries.
    fn body(&mut self, method: &str, path: &str) -> Option<Value> {
        Some(match (method, path) {
            ("PATCH", "/1.0/config") => self.of::<ConfigPatch>(),
            ("POST", "/1.0/certificates") => self.of::<CertificatesPost>(),
            ("POST", "/1.0/auth/identities") => self.of::<IdentitiesPost>(),
            ("PUT", "/1.0/auth/identities/{id}") => self.of::<IdentityPut>(),
            ("POST", "/1.0/auth/groups") => self.of::<GroupsPost>(),
            ("PUT", "/1.0/auth/groups/{name}") => self.of::<GroupPut>(),
            ("POST", "/1.0/nodes") => self.of::<NodesPost>(),
            ("PATCH", "/1.0/nodes/{name}") => self.of::<NodePatch>(),
            ("DELETE", "/1.0/nodes/{name}") => self.of::<NodeDelete>(),
            ("POST", "/1.0/images") => self.of::<ImagesPost>(),
            ("PATCH", "/1.0/images/{id}") => self.of::<ImagePatch>(),
            ("PATCH", "/1.0/applications/{id}") => self.of::<ApplicationPatch>(),
            ("PATCH", "/1.0/applications/{id}/{version}") => self.of::<ApplicationVersionPatch>(),
            ("POST", "/1.0/instances") => self.of::<InstancesPost>(),
            ("POST", "/1.0/containers") => self.of::<super::containers::ContainersPost>(),
            ("PATCH", "/1.0/instances/{id}" | "/1.0/containers/{id}") => self.of::<InstancePatch>(),
            ("POST", "/1.0/instances/{id}/exec" | "/1.0/containers/{id}/exec") => self.of::<ExecPost>(),
            ("POST", "/1.0/instances/{id}/shares") => self.of::<SharePost>(),
            ("PATCH", "/1.0/instances/{id}/shares/{share}") => self.of::<SharePatch>(),
            ("DELETE", "/1.0/instances" | "/1.0/containers" | "/1.0/applications") => self.of::<DeleteMany>(),
            ("DELETE", _) => self.of::<Delete>(),
            _ => return None,
        })
    }
}

fn describe(operation: &Described, schemas: &mut Schemas) -> Value {
    let route = ROUTES.iter().find(|route| route.path == operation.path);
    let need = route.and_then(|route| route.methods.iter().find(|(method, _)| *method == operation.method));
    let open = need.is_some_and(|(_, need)| *need == Need::Open);
    let mut parameters: Vec<Value> = operation.query.iter().map(|name| parameter(name)).collect();
    for part in operation.path.split('/') {
        if let Some(name) = part.strip_prefix('{').and_then(|part| part.strip_suffix('}')) {
            let schema = json!({"type": "string", "minLength": 1});
            parameters.push(json!({"name": name, "in": "path", "required": true, "schema": schema}));
        }
    }
    let (code, answer) = success(operation.answer);
    let mut responses = Map::new();
    responses.insert(code.into(), answer);
    let failed = json!({"description": "It was refused, or failed.", "content": json_content("Error")});
    responses.insert("default".into(), failed);
    let name = route.map_or("", |route| route.name);
    let mut described = json!({
        "operationId": format!("{}_{name}", operation.method.to_lowercase()),
        "summary": operation.summary,
        "parameters": parameters,
        "security": if open { json!([]) } else { json!([{"certificate": []}, {"token": []}]) },
        "responses": responses,
    });
    let mut object = || json!({"schema": schemas.body(operation.method, operation.path)});
    let file = || json!({"schema": {"type": "string", "format": "binary"}});
    let content = match operation.body {
        Body::Nothing => return described,
        Body::Object | Body::Optional => json!({"application/json": object()}),
        Body::File => json!({"application/octet-stream": file()}),
        Body::FileOrObject => json!({"application/json": object(), "application/octet-stream": file()}),
    };
    let required = matches!(operation.body, Body::Object | Body::File);
    described["requestBody"] = json!({"required": required, "content": content});
    described
}

fn envelope(kind: &str, metadata: &Value) -> Value {
    json!({
        "type": "object",
        "properties": {
            "type": {"const": kind},
            "status": {"type": "string"},
            "status_code": {"type": "integer"},
            "operation": {"type": "string"},
            "error_code": {"type": "integer"},
            "error": {"type": "string"},
            "metadata": metadata,
            "total_size": {"type": "integer", "minimum": 0},
        },
        "required": ["type", "metadata"],
    })
}

/// The description of the API.
#[must_use]
pub fn openapi() -> Value {
    let mut paths = Map::new();
    let mut schemas = Schemas::default();
    for operation in OPERATIONS {
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method.to_lowercase()] = describe(operation, &mut schemas);
    }
    for (name, answer) in [
        ("Sync", envelope("sync", &json!({}))),
        ("List", envelope("sync", &json!({"type": "array"}))),
        ("Async", envelope("async", &json!({"type": "object"}))),
        ("Error", envelope("error", &json!({"type": "object"}))),
    ] {
        schemas.0.insert(name.into(), answer);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Fanlight AMS",
            "version": "1.0",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas.0,
            "securitySchemes": {
                "certificate": {"type": "mutualTLS", "description": "The certificate of an identity."},
                "token": {
                    "type": "http", "scheme": "bearer",
                    "description": "A token of the OIDC provider.",
                },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Method and path of everything that the router serves.
    fn served() -> BTreeSet<(String, String)> {
        let mut all = BTreeSet::new();
        for part in include_str!("mod.rs").split(".route(").skip(1) {
            let Some((path, handlers)) =
                part.trim_start().strip_prefix('"').and_then(|rest| rest.split_once('"'))
            else {
                continue;
            };
            let handlers = handlers.split(".route_layer(").next().unwrap_or_default();
            for method in ["GET", "POST", "PUT", "PATCH", "DELETE"] {
                if handlers.contains(&format!("{}(", method.to_lowercase())) {
                    all.insert((method.to_owned(), path.to_owned()));
                }
            }
        }
        assert!(all.len() > 40, "the routes were found");
        all
    }

    fn in_description() -> BTreeSet<(String, String)> {
        let document = openapi();
        let paths = document["paths"].as_object().expect("paths");
        paths
            .iter()
            .flat_map(|(path, methods)| {
                let methods = methods.as_object().expect("methods");
                methods.keys().map(move |method| (method.to_uppercase(), path.clone()))
            })
            .collect()
    }

    #[test]
    fn the_description_has_every_route_of_the_router_and_no_other() {
        assert_eq!(in_description(), served());
        assert_eq!(in_description().len(), OPERATIONS.len(), "nothing is described twice");
    }

    #[test]
    fn every_object_that_a_request_carries_is_described_with_its_members() {
        let document = openapi();
        let mut described = 0;
        for operation in OPERATIONS
            .iter()
            .filter(|one| matches!(one.body, Body::Object | Body::Optional | Body::FileOrObject))
        {
            let body = &document["paths"][operation.path][operation.method.to_lowercase()]["requestBody"];
            let schema = &body["content"]["application/json"]["schema"];
            let schema = match schema["$ref"].as_str() {
                Some(name) => &document["components"]["schemas"][name.rsplit('/').next().expect("a name")],
                None => schema,
            };
            let members = schema["properties"].as_object().map_or(0, Map::len);
            assert!(members > 0, "{} {}: {schema}", operation.method, operation.path);
            described += 1;
        }
        assert!(described > 20, "the bodies were looked at");
    }

    #[test]
    fn every_operation_has_its_own_id() {
        let document = openapi();
        let paths = document["paths"].as_object().expect("paths").values();
        let operations = paths.flat_map(|path| path.as_object().expect("methods").values());
        let ids: BTreeSet<&str> = operations.map(|one| one["operationId"].as_str().expect("an id")).collect();
        assert_eq!(ids.len(), OPERATIONS.len());
    }

    #[test]
    fn the_description_in_the_documentation_is_the_one_of_the_server() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reference/api/ams.json");
        let document = serde_json::to_string_pretty(&openapi()).expect("JSON") + "\n";
        if std::env::var_os("FANLIGHT_GENERATE").is_some() {
            std::fs::write(path, &document).expect("written");
        }
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert!(written == document, "docs/reference/api/ams.json is not up to date: run `./dev generate`");
    }

    #[test]
    fn the_table_of_endpoints_names_every_route_and_only_those() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reference/ams-endpoints.md");
        let text = std::fs::read_to_string(path).expect("the reference is in the repository");
        let mut offered = BTreeSet::new();
        let mut refused = 0;
        for row in text.lines().filter(|line| line.contains("| `/")) {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let route = (cells[1].to_owned(), cells[2].trim_matches('`').to_owned());
            match cells[3] {
                "works" => assert!(offered.insert(route), "{row}: it stands there twice"),
                "differs" => {
                    assert!(!cells[4].is_empty(), "{row}: how it differs is said");
                    assert!(offered.insert(route), "{row}: it stands there twice");
                }
                "not offered" => {
                    assert!(!cells[4].is_empty(), "{row}: the reason is said");
                    assert!(!served().contains(&route), "{row}: it is served");
                    refused += 1;
                }
                other => panic!("{row}: {other} is neither works, differs nor not offered"),
            }
        }
        assert_eq!(offered, in_description());
        assert!(refused > 0, "what is not offered is named too");
    }
}
