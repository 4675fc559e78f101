//! Configuration of a program: defaults, then one TOML file, then environment variables.
//!
//! Everything that is wrong is reported at once: unknown keys, wrong types, and what the program's own
//! [`Validate`] finds. Environment variables are named `PREFIX_KEY` and `PREFIX_TABLE__KEY`; secrets do not
//! belong into either, they are read from files named in the configuration.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};
use toml::{Table, Value};

/// Checks between values, beyond what types can say.
pub trait Validate {
    /// One text per problem, each naming the key and the value; empty when all is well.
    fn problems(&self) -> Vec<String> {
        Vec::new()
    }
}

/// All that is wrong with a configuration.
#[derive(Debug)]
pub struct ConfigErrors {
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
    /// One text per problem.
    pub problems: Vec<String>,
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "configuration {} is not usable:", file.display())?,
            None => write!(f, "configuration is not usable:")?,
        }
        self.problems.iter().try_for_each(|problem| write!(f, "\n  - {problem}"))
    }
}

impl std::error::Error for ConfigErrors {}

/// Reads the configuration of this process.
///
/// `path` must exist when it is given. `prefix` is the start of the environment variables (`GATEWAY`); with
/// an empty prefix the environment is not read.
///
/// # Errors
/// Everything that is wrong, in one error.
pub fn load<C>(path: Option<&Path>, prefix: &str) -> Result<C, ConfigErrors>
where
    C: DeserializeOwned + Serialize + Default + Validate,
{
    let text = match path {
        None => String::new(),
        Some(path) => std::fs::read_to_string(path).map_err(|error| ConfigErrors {
            file: Some(path.to_owned()),
            problems: vec![format!("reading the file: {error}")],
        })?,
    };
    // A variable that is not Unicode cannot be one of ours.
    let variables = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    parse(&text, prefix, variables)
        .map_err(|problems| ConfigErrors { file: path.map(Path::to_owned), problems })
}

/// The pure part of [`load`].
///
/// # Errors
/// One text per problem.
pub fn parse<C>(
    text: &str,
    prefix: &str,
    variables: impl IntoIterator<Item = (String, String)>,
) -> Result<C, Vec<String>>
where
    C: DeserializeOwned + Serialize + Default + Validate,
{
    let defaults = defaults::<C>();
    let mut problems = Vec::new();
    let mut table = defaults.clone();
    match text.parse::<Table>() {
        Ok(file) => merge(&mut table, file),
        Err(error) => problems.push(error.to_string().trim_end().to_owned()),
    }
    let prefix = prefix.trim_end_matches('_');
    // Dotted path of a key set by the environment → the variable, and its text for a second reading.
    let mut sources = BTreeMap::new();
    if !prefix.is_empty() {
        let start = format!("{prefix}_");
        for (name, value) in variables {
            let Some(key) = name.strip_prefix(&start) else { continue };
            let path: Vec<String> = key.split("__").map(str::to_lowercase).collect();
            let hint = path.iter().try_fold(None, |at: Option<&Value>, key| match at {
                None => defaults.get(key).map(Some),
                Some(at) => at.get(key).map(Some),
            });
            let parsed = from_variable(&value, hint.flatten());
            if insert(&mut table, &path, parsed) {
                sources.insert(path.join("."), (name, value));
            } else {
                problems.push(format!("variable {name}: {} is not a table", path.join(".")));
            }
        }
    }
    // A value that is refused is reported, taken out, and the rest is tried again: all problems in one go.
    let config = loop {
        let error = match serde_path_to_error::deserialize::<_, C>(Value::Table(table.clone())) {
            Ok(config) => break Some(config),
            Err(error) => error,
        };
        let keys: Vec<String> = error
            .path()
            .iter()
            .map_while(|segment| match segment {
                serde_path_to_error::Segment::Map { key } => Some(key.clone()),
                _ => None,
            })
            .collect();
        let name = keys.join(".");
        if let Some((_, text)) = sources.get(&name)
            && !matches!(at(&table, &keys), Some(Value::String(_)))
        {
            // `123` was read as a number, but the key wants a text.
            insert(&mut table, &keys, Value::String(text.clone()));
            continue;
        }
        let message = error.inner().to_string();
        let message = message.lines().next().unwrap_or_default();
        let origin = sources.get(&name).map(|(name, _)| format!("variable {name}, key ")).unwrap_or_default();
        problems.push(match name.as_str() {
            "" => message.to_owned(),
            name => format!("{origin}{name}: {message}"),
        });
        if !remove(&mut table, &keys) {
            break None;
        }
    };
    if let Some(config) = &config {
        problems.extend(config.problems());
    }
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        _ => Err(problems),
    }
}

/// The defaults as TOML, the reference of all keys that have one.
pub fn example<C: Serialize + Default>() -> String {
    toml::to_string_pretty(&C::default()).expect("defaults can be written as TOML")
}

fn defaults<C: Serialize + Default>() -> Table {
    Table::try_from(C::default()).expect("defaults can be written as TOML")
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(into)), Value::Table(from)) => merge(into, from),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

fn at<'a>(table: &'a Table, path: &[String]) -> Option<&'a Value> {
    let (first, rest) = path.split_first()?;
    rest.iter().try_fold(table.get(first)?, |value, key| value.get(key))
}

fn insert(table: &mut Table, path: &[String], value: Value) -> bool {
    match path {
        [] => false,
        [key] => {
            table.insert(key.clone(), value);
            true
        }
        [key, rest @ ..] => match table.entry(key.clone()).or_insert_with(|| Value::Table(Table::new())) {
            Value::Table(inner) => insert(inner, rest, value),
            _ => false,
        },
    }
}

/// Takes out the deepest value on `path` that exists.
fn remove(table: &mut Table, path: &[String]) -> bool {
    let Some((key, rest)) = path.split_first() else { return false };
    if let Some(Value::Table(inner)) = table.get_mut(key)
        && !rest.is_empty()
        && remove(inner, rest)
    {
        return true;
    }
    table.remove(key).is_some()
}

fn from_variable(text: &str, hint: Option<&Value>) -> Value {
    if matches!(hint, Some(Value::String(_))) {
        return Value::String(text.to_owned());
    }
    let literal = format!("value = {text}").parse::<Table>().ok().and_then(|mut table| {
        // A text with line breaks could bring in more keys.
        (table.len() == 1).then(|| table.remove("value")).flatten()
    });
    match (literal, hint) {
        (Some(value), _) => value,
        (None, Some(Value::Array(_))) => Value::Array(
            text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(Value::from).collect(),
        ),
        (None, _) => Value::String(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Deserialize, Serialize)]
    #[serde(default, deny_unknown_fields)]
    struct Example {
        listen: SocketAddr,
        limit: u32,
        origins: Vec<String>,
        name: Option<String>,
        bus: Bus,
    }

    #[derive(Debug, PartialEq, Deserialize, Serialize)]
    #[serde(default, deny_unknown_fields)]
    struct Bus {
        url: String,
        tls: bool,
    }

    impl Default for Example {
        fn default() -> Self {
            let bus = Bus { url: "nats://there".into(), tls: true };
            Self { listen: ([127, 0, 0, 1], 4000).into(), limit: 5, origins: vec![], name: None, bus }
        }
    }

    impl Default for Bus {
        fn default() -> Self {
            Self { url: "local:".into(), tls: false }
        }
    }

    impl Validate for Example {
        fn problems(&self) -> Vec<String> {
            if self.limit == 0 { vec!["limit is 0: at least 1 is needed".into()] } else { vec![] }
        }
    }

    fn read(text: &str, variables: &[(&str, &str)]) -> Result<Example, Vec<String>> {
        parse(text, "EX", variables.iter().map(|(name, value)| (name.to_string(), value.to_string())))
    }

    #[test]
    fn the_environment_beats_the_file_and_the_file_beats_the_defaults() {
        let config = read(
            "limit = 7\n[bus]\nurl = 'local:'",
            &[
                ("EX_LIMIT", "9"),
                ("EX_BUS__TLS", "false"),
                ("EX_ORIGINS", "https://a, https://b"),
                ("EX_NAME", "123"),
                ("EX_LISTEN", "[::1]:0"),
                ("OTHER_LIMIT", "x"),
            ],
        )
        .expect("valid");
        assert_eq!(config.limit, 9);
        assert_eq!(config.bus, Bus { url: "local:".into(), tls: false });
        assert_eq!(config.origins, ["https://a", "https://b"]);
        assert_eq!(config.name.as_deref(), Some("123"));
        assert_eq!(config.listen, "[::1]:0".parse().expect("address"));
        assert_eq!(read("", &[]).expect("defaults").bus.url, "nats://there");
    }

    #[test]
    fn all_problems_are_reported_at_once_each_with_its_key() {
        let problems = read(
            "limit = 0\nlisten = 'nowhere'\ncolour = 'red'\n[bus]\ntls = 'perhaps'\nulr = 'x'",
            &[("EX_LIMITS", "9"), ("EX_LIMIT__MORE", "1")],
        )
        .expect_err("full of problems");
        let all = problems.join("\n");
        for part in ["limit is 0", "listen: ", "colour", "bus.tls: ", "ulr", "EX_LIMITS", "EX_LIMIT__MORE"] {
            assert!(all.contains(part), "{part} is missing in:\n{all}");
        }
        assert_eq!(problems.len(), 7, "{all}");
    }

    #[test]
    fn a_broken_file_says_where_it_is_broken() {
        let problems = read("limit = = 3", &[]).expect_err("no TOML");
        assert!(problems[0].contains("line 1"), "{problems:?}");
        let error = load::<Example>(Some(Path::new("/nonexistent/example.toml")), "").expect_err("no file");
        assert!(error.to_string().contains("example.toml"), "{error}");
    }

    #[test]
    fn the_example_is_read_back_as_the_defaults() {
        assert_eq!(read(&example::<Example>(), &[]).expect("valid"), Example::default());
    }
}
