//! Packages of applications and addons as AMS takes them: an archive that is there already, or a folder that becomes
//! one.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use bzip2::{Compression, write::BzEncoder};
use tempfile::NamedTempFile;

use crate::registry;

/// A package on disk; what was made for it is gone when this is.
pub enum Package {
    /// Somebody's own archive.
    Given(PathBuf),
    /// Made of a folder.
    Made(NamedTempFile),
}

impl Package {
    /// The package that a path means.
    ///
    /// # Errors
    /// There is nothing, or a folder without a manifest, or something that is no archive that AMS takes.
    pub fn of(path: &Path) -> Result<Self> {
        let about = std::fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
        if about.is_file() {
            let known = [".zip", ".tar.bz2", ".tbz2", ".tar.gz", ".tgz", ".tar"];
            let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
            if !known.iter().any(|ending| name.ends_with(ending)) {
                bail!(
                    "{} is no package; expected a folder, or a file that ends in {}",
                    path.display(),
                    known.join(", ")
                );
            }
            return Ok(Self::Given(path.to_owned()));
        }
        if !path.join("manifest.yaml").is_file() {
            bail!("{} holds no manifest.yaml, which a package needs in its root", path.display());
        }
        // tar.bz2 is what every AMS takes, the original's too.
        let file = NamedTempFile::new().context("making a file for the package")?;
        let writer = BzEncoder::new(std::io::BufWriter::new(file), Compression::fast());
        let writer = registry::archive(path, writer)?;
        let file = writer
            .finish()
            .and_then(|buffered| buffered.into_inner().map_err(std::io::IntoInnerError::into_error))
            .with_context(|| format!("packing {}", path.display()))?;
        Ok(Self::Made(file))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        match self {
            Self::Given(path) => path,
            Self::Made(file) => file.path(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn a_folder_becomes_an_archive_with_the_manifest_in_its_root() {
        let folder = tempfile::tempdir().expect("temporary folder");
        std::fs::write(folder.path().join("manifest.yaml"), "name: a\n").expect("written");
        std::fs::create_dir(folder.path().join("hooks")).expect("made");
        std::fs::write(folder.path().join("hooks/pre-start"), "#!/bin/sh\n").expect("written");
        let package = Package::of(folder.path()).expect("packed");
        let bytes = std::fs::File::open(package.path()).expect("there");
        let mut archive = tar::Archive::new(bzip2::read::BzDecoder::new(bytes));
        let mut found = Vec::new();
        for entry in archive.entries().expect("a tar") {
            let mut entry = entry.expect("whole");
            let mut text = String::new();
            entry.read_to_string(&mut text).expect("text");
            found.push((entry.path().expect("a path").display().to_string(), text));
        }
        assert_eq!(
            found,
            [("hooks/pre-start".into(), "#!/bin/sh\n".into()), ("manifest.yaml".into(), "name: a\n".into())]
        );
    }

    #[test]
    fn what_is_no_package_is_refused_with_what_would_be_one() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let refused = |path: &Path| Package::of(path).err().expect("refused").to_string();
        assert!(refused(folder.path()).contains("manifest.yaml"));
        let file = folder.path().join("app.exe");
        std::fs::write(&file, "x").expect("written");
        assert!(refused(&file).contains(".tar.bz2"));
        assert!(refused(&folder.path().join("none")).contains("none"));
    }
}
