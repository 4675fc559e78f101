//! Answers on standard output: tables for people, JSON and YAML for programs.

use std::io::{self, IsTerminal as _, Write as _};

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::Value;

use super::{cli::Format, failure::Usage};

/// A column: its title, and where its cells come from.
pub type Column = (&'static str, fn(&Value) -> String);

/// A member of an object by its path, such as `/name`; a list becomes its members with commas between.
pub fn cell(object: &Value, pointer: &str) -> String {
    object.pointer(pointer).map(text).unwrap_or_default()
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(list) => list.iter().map(text).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// A time in Unix seconds, for people.
pub fn time(object: &Value, pointer: &str) -> String {
    let seconds = object.pointer(pointer).and_then(Value::as_u64).filter(|seconds| *seconds > 0);
    let Some(at) = seconds.and_then(|s| std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_secs(s)))
    else {
        return String::new();
    };
    humantime::format_rfc3339_seconds(at).to_string()
}

/// Prints a list of objects.
pub fn list(format: Format, objects: &[Value], columns: &[Column]) -> Result<()> {
    match format {
        Format::Table => {
            let titles = columns.iter().map(|(title, _)| (*title).to_owned()).collect();
            let rows = objects.iter().map(|object| columns.iter().map(|(_, cell)| cell(object)).collect());
            print(&table(std::iter::once(titles).chain(rows).collect()))
        }
        other => document(other, &objects),
    }
}

/// Prints one object; as a table it is a line for each member.
pub fn object(format: Format, object: &Value) -> Result<()> {
    match format {
        Format::Table => {
            let mut rows = Vec::new();
            members("", object, &mut rows);
            print(&table(rows))
        }
        other => document(other, object),
    }
}

fn members(path: &str, value: &Value, rows: &mut Vec<Vec<String>>) {
    let name = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| members(&name(key), value, rows)),
        Value::Array(list) if list.iter().any(|item| item.is_object() || item.is_array()) => {
            list.iter()
                .enumerate()
                .for_each(|(index, value)| members(&name(&index.to_string()), value, rows));
        }
        other => rows.push(vec![path.to_owned(), text(other)]),
    }
}

/// Prints anything as JSON or YAML.
pub fn document(format: Format, what: &(impl Serialize + ?Sized)) -> Result<()> {
    let text = match format {
        Format::Yaml => serde_yaml_ng::to_string(what).context("writing the answer as YAML")?,
        _ => {
            let mut text = serde_json::to_string_pretty(what).context("writing the answer as JSON")?;
            text.push('\n');
            text
        }
    };
    print(&text)
}

/// Rows with cells below each other. What others wrote into a cell cannot move the cursor of a terminal.
fn table(rows: Vec<Vec<String>>) -> String {
    let rows: Vec<Vec<String>> =
        rows.into_iter().map(|row| row.iter().map(|cell| harmless(cell)).collect()).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A text without characters that do something to a terminal.
pub fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Prints a text. Nobody reading any more is no failure: `fanlight ls | head -1` is a good question.
pub fn print(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

/// Prints bytes as they are.
pub fn print_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("printing the answer"),
    }
}

/// Says something to people beside the answer.
pub fn note(text: &str) {
    // Nobody reading it is no reason to stop.
    let _ = writeln!(io::stderr(), "{text}");
}

/// A number of things, in words.
pub fn count(number: usize, thing: &str) -> String {
    if number == 1 { format!("1 {thing}") } else { format!("{number} {thing}s") }
}

/// Asks for a yes before something that cannot be undone.
///
/// # Errors
/// The answer is no; or nobody can be asked, because standard input is no terminal.
pub fn confirm(question: &str, yes: bool) -> Result<()> {
    if yes || ask(question)? { Ok(()) } else { anyhow::bail!("nothing was done") }
}

/// Asks a question on the terminal.
///
/// # Errors
/// Nobody can be asked.
pub fn ask(question: &str) -> Result<bool> {
    if !io::stdin().is_terminal() {
        return Err(Usage(format!(
            "{question} Nobody can be asked, as standard input is no terminal; give --yes"
        ))
        .into());
    }
    let _ = write!(io::stderr(), "{question} [y/N] ");
    let _ = io::stderr().flush();
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).context("reading the answer")?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tables_are_aligned_and_end_without_blanks() {
        let rows = [["NAME", "STATUS"], ["a", "running"], ["ünïcode", ""]];
        let text = table(rows.iter().map(|row| row.map(String::from).to_vec()).collect());
        assert_eq!(text, "NAME     STATUS\na        running\nünïcode\n");
        assert_eq!(table(Vec::new()), "");
    }

    #[test]
    fn texts_of_others_cannot_drive_a_terminal() {
        let text = table(vec![vec!["a\x1b[2Jb\r\nc".into()]]);
        assert_eq!(text, "a [2Jb  c\n");
    }

    #[test]
    fn one_object_is_shown_with_a_line_for_each_member() {
        let mut rows = Vec::new();
        members("", &json!({"a": {"b": 1, "c": ["x", "y"]}, "d": [{"e": null}], "f": []}), &mut rows);
        let rows: Vec<String> = rows.iter().map(|row| row.join("=")).collect();
        assert_eq!(rows, ["a.b=1", "a.c=x,y", "d.0.e=", "f="]);
    }
}
