//! The generated references under `docs/reference`: compared with what the programs say of themselves, and written
//! again with `./dev generate`.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::PathBuf};

use clap::CommandFactory;
use serde::Serialize;

/// One field of a settings struct, as its source tells it.
struct Field {
    name: String,
    kind: String,
    doc: String,
}

/// Structs of a source file: their public fields with documentation.
fn structs(source: &str) -> BTreeMap<String, Vec<Field>> {
    let mut found = BTreeMap::new();
    let mut doc = String::new();
    let mut current: Option<(String, Vec<Field>)> = None;
    for line in source.lines() {
        let line = line.trim();
        if let Some(text) = line.strip_prefix("///") {
            if !doc.is_empty() {
                doc.push(' ');
            }
            doc.push_str(text.trim());
            continue;
        }
        if let Some(rest) = line.strip_prefix("pub struct ") {
            let name = rest.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
            current = line.ends_with('{').then(|| (name.to_owned(), Vec::new()));
        } else if line == "}" {
            if let Some((name, fields)) = current.take() {
                found.insert(name, fields);
            }
        } else if let Some((_, fields)) = &mut current
            && let Some((name, kind)) = line.strip_prefix("pub ").and_then(|rest| rest.split_once(": "))
        {
            fields.push(Field {
                name: name.to_owned(),
                kind: kind.trim_end_matches(',').to_owned(),
                doc: std::mem::take(&mut doc),
            });
        }
        if !line.starts_with("#[") {
            doc.clear();
        }
    }
    found
}

fn section(
    text: &mut String,
    structs: &BTreeMap<String, Vec<Field>>,
    name: &str,
    prefix: &str,
    values: &toml::Table,
    problems: &mut Vec<String>,
) {
    let fields = structs.get(name).unwrap_or_else(|| panic!("the source holds no struct {name}"));
    for field in fields {
        let key = if prefix.is_empty() { field.name.clone() } else { format!("{prefix}.{}", field.name) };
        let inner = field.kind.rsplit("::").next().unwrap_or(&field.kind);
        if field.doc.is_empty() {
            problems.push(format!("{key} is not described"));
        }
        if structs.contains_key(inner) {
            let empty = toml::Table::new();
            let table = values.get(&field.name).and_then(toml::Value::as_table).unwrap_or(&empty);
            section(text, structs, inner, &key, table, problems);
        } else {
            let default = values.get(&field.name).map_or("none".to_owned(), |value| format!("`{value}`"));
            // Writing to a String cannot fail.
            let _ = writeln!(text, "| `{key}` | {default} | {} |", field.doc.replace('|', "\\|"));
        }
    }
}

fn program<C: Serialize + Default>(text: &mut String, name: &str, prefix: &str, sources: &[&str]) {
    let all: BTreeMap<String, Vec<Field>> = sources.iter().rev().flat_map(|source| structs(source)).collect();
    let values = toml::Table::try_from(C::default()).expect("settings are a table");
    let mut problems = Vec::new();
    let _ = write!(
        text,
        "\n## {name}\n\nEnvironment: `{prefix}_…`\n\n| key | default | meaning |\n|---|---|---|\n"
    );
    section(text, &all, "Config", "", &values, &mut problems);
    assert!(problems.is_empty(), "{name}: {problems:?}");
}

fn compare(name: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference").join(name);
    if std::env::var_os("FANLIGHT_GENERATE").is_some() {
        fs::write(&path, text).expect("docs/reference can be written");
        return;
    }
    let present = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        present == text,
        "docs/reference/{name} is not what the programs say; run ./dev generate and commit it"
    );
}

const BUS: &str = include_str!("../../lib/bus/src/config.rs");
const STORE: &str = include_str!("../../lib/store/src/config.rs");

#[test]
fn the_configuration_reference_is_what_the_programs_read() {
    let mut text = String::from(
        "# Configuration\n\n\
         Every program reads one TOML file (`--config FILE`). What is not in it has the default below. An environment variable\n\
         goes before the file: the program's prefix, then the key in capitals, with two underscores for each dot\n\
         (`GATEWAY_BUS__URL` is `bus.url` of the gateway). Unknown keys and wrong values are errors, all reported at once.\n\n\
         `fanlight up` needs none of this: it makes the settings itself.\n",
    );
    program::<fanlight_gateway::Config>(
        &mut text,
        "Gateway",
        "GATEWAY",
        &[include_str!("../../gateway/src/config.rs"), BUS, STORE],
    );
    program::<fanlight_agent::Config>(
        &mut text,
        "Agent",
        "AGENT",
        &[include_str!("../../agent/src/config.rs"), BUS],
    );
    program::<fanlight_ams::Config>(
        &mut text,
        "AMS",
        "AMS",
        &[include_str!("../../ams/src/config.rs"), STORE],
    );
    text.push_str(
        "\nThe streamer reads `/etc/fanlight/streamer.toml` where no file is named. Instances of the process engine see that file\n\
         of their host, and the `STREAMER_…` variables of AMS. What belongs to one instance is in its guest file.\n",
    );
    program::<fanlight_streamer::Config>(
        &mut text,
        "Streamer",
        "STREAMER",
        &[include_str!("../../streamer/src/config.rs")],
    );
    compare("configuration.md", &text);
}

#[test]
fn the_command_line_reference_is_what_the_command_understands() {
    let mut text = String::from(
        "# Command line\n\nThe `fanlight` command.\n\n\
         | exit code | meaning |\n|---|---|\n\
         | 0 | done |\n| 1 | failed |\n| 2 | what was typed makes no sense |\n| 3 | there is no such object |\n\
         | 4 | not permitted, or not let in |\n\n\
         `exec`, `shell`, and `logs` where it runs a program in the instance, end with the exit code of the program; 128 + n\n\
         where signal n ended it.\n\n\
         The verbs of AMS ask the stack of a state folder on this machine, the remote `local`, or the remote that was\n\
         switched to. Remotes are kept in `~/.config/fanlight/remotes.toml`, this client's own certificate and key beside it.\n\
         `source <(fanlight completion bash)` completes commands, options and names.\n",
    );
    commands(&mut text, &mut fanlight::Cli::command(), "fanlight");
    compare("command-line.md", &text);
}

fn commands(text: &mut String, command: &mut clap::Command, path: &str) {
    let children: Vec<String> = command
        .get_subcommands()
        .filter(|child| !child.is_hide_set())
        .map(|child| child.get_name().to_owned())
        .collect();
    if children.is_empty() {
        let help = command.clone().bin_name(path).render_long_help().to_string();
        let help = help.lines().map(str::trim_end).collect::<Vec<_>>().join("\n");
        let _ = write!(text, "\n## {path}\n\n```\n{}\n```\n", help.trim_end());
    }
    for child in children {
        if let Some(command) = command.find_subcommand_mut(&child) {
            commands(text, command, &format!("{path} {child}"));
        }
    }
}
