//! The variables by which other programs find a running stack.

use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use anyhow::Result;

use crate::state::{read_optional, write_private};

/// `FANLIGHT_…` variables of a stack.
#[derive(Clone, Debug)]
pub struct Environment {
    /// Base address of the gateway's API.
    pub gateway_url: String,
    /// Base address of AMS.
    pub ams_url: String,
    /// API token of the gateway.
    pub token: fanlight_api::Secret,
    /// PEM of the authority of all server certificates.
    pub ca: String,
    /// PEM of the administrator's client certificate for AMS.
    pub ams_certificate: String,
    /// PEM of its key.
    pub ams_key: String,
    /// The page, with a one-time code.
    pub page_url: String,
}

impl Environment {
    /// Lines that a shell can source.
    fn render(&self) -> String {
        let mut text = String::new();
        for (name, value) in [
            ("GATEWAY_URL", self.gateway_url.as_str()),
            ("AMS_URL", &self.ams_url),
            ("TOKEN", self.token.expose()),
            ("CA", &self.ca),
            ("AMS_CERT", &self.ams_certificate),
            ("AMS_KEY", &self.ams_key),
            ("PAGE_URL", &self.page_url),
        ] {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "FANLIGHT_{name}='{}'", value.replace('\'', r"'\''"));
        }
        text
    }

    /// Writes the variables, mode 0600.
    ///
    /// # Errors
    /// Names the file.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_private(path, self.render().as_bytes())
    }
}

/// Reads the variables that a stack wrote; nothing where none was.
///
/// # Errors
/// The file is there and cannot be read.
pub fn read(path: &Path) -> Result<Option<BTreeMap<String, String>>> {
    let line = |line: &str| {
        let (name, value) = line.split_once('=')?;
        let value = value.strip_prefix('\'')?.strip_suffix('\'')?;
        Some((name.to_owned(), value.replace(r"'\''", "'")))
    };
    Ok(read_optional(path)?.map(|text| text.lines().filter_map(line).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_a_shell() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("env");
        let environment = Environment {
            gateway_url: "https://127.0.0.1:1".into(),
            ams_url: "https://127.0.0.1:2".into(),
            token: fanlight_api::Secret::new("to'ken $HOME"),
            ca: "/a b".into(),
            ams_certificate: String::new(),
            ams_key: String::new(),
            page_url: "http://127.0.0.1:3/ui/#code=x&y".into(),
        };
        environment.write(&file).expect("written");
        let shell = std::process::Command::new("sh")
            .args([
                "-c",
                r#". "$1"; printf '%s|%s|%s' "$FANLIGHT_TOKEN" "$FANLIGHT_CA" "$FANLIGHT_PAGE_URL""#,
                "sh",
            ])
            .arg(&file)
            .output()
            .expect("a shell is there");
        assert_eq!(
            String::from_utf8_lossy(&shell.stdout),
            "to'ken $HOME|/a b|http://127.0.0.1:3/ui/#code=x&y"
        );
        let read = read(&file).expect("readable").expect("there");
        assert_eq!(read["FANLIGHT_TOKEN"], "to'ken $HOME");
        assert_eq!(read["FANLIGHT_AMS_CERT"], "");
    }
}
