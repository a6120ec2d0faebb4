//! Why a command cannot start, said before or after the attempt, with the remedy.
//!
//! The kernel answers ENOENT for a missing folder, a missing program and a script's missing interpreter alike, and
//! glibc hands a file of no known format to `/bin/sh` instead of refusing it, so the likely causes are looked for.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

/// What decides whether a command can start.
#[derive(Clone)]
pub(super) struct Plan {
    pub(super) program: String,
    pub(super) cwd: Option<PathBuf>,
    /// The command's own PATH, where the program is looked for.
    pub(super) path: OsString,
    /// Bytes of all arguments and variables.
    pub(super) size: usize,
}

/// Why a command did not start: its message is the run's `error`.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error("the command is empty: `argv` needs at least the program")]
    Empty,
    #[error("{0} contains a NUL byte, which no process can be given: remove it")]
    Nul(String),
    #[error("`env` has the name {0:?}: a name is not empty and has no `=`")]
    Name(String),
    #[error("working directory {0:?} does not exist on this worker: create it or correct `cwd`")]
    CwdMissing(PathBuf),
    #[error("working directory {0:?} is not a directory: correct `cwd`")]
    CwdNotDirectory(PathBuf),
    #[error("working directory {0:?} may not be entered by the command's user ({1}): correct `cwd` or its permissions")]
    CwdDenied(PathBuf, io::Error),
    #[error(
        "program {program:?} was not found on PATH={path}: install it on this worker, or give its full path in `argv` or a PATH in `env`"
    )]
    NotOnPath { program: String, path: String },
    #[error("program {0:?} does not exist on this worker: install it or correct `argv`")]
    Missing(PathBuf),
    #[error("program {0:?} is a directory: correct `argv`")]
    IsDirectory(PathBuf),
    #[error("program {0:?} is no regular file: correct `argv`")]
    NotAFile(PathBuf),
    #[error(
        "program {0:?} is not executable by the command's user (permission denied): chmod +x it, or correct `argv`"
    )]
    NotExecutable(PathBuf),
    #[error(
        "program {0:?} has an unknown format (exec format error): a script needs a first line such as `#!/bin/sh`, a binary must be built for this machine"
    )]
    Format(PathBuf),
    #[error(
        "program {0:?} exists, but the interpreter of its `#!` line, or the loader it was linked for, does not: install that"
    )]
    Interpreter(PathBuf),
    #[error(
        "argument list too long: `argv` and the environment hold {0} bytes, one may hold 128 KiB; pass large values as the run's input"
    )]
    TooLong(usize),
    #[error(
        "cannot start {program:?}: {error}; this worker's host is short of it, or `limits` allow no more (see `ulimit -a` and free memory)"
    )]
    Exhausted { program: String, error: io::Error },
    #[error("cannot start {program:?}: {error}")]
    Other { program: String, error: io::Error },
}

impl Plan {
    /// The plan for a command, whose last variable of a name counts.
    pub(super) fn new(
        argv: &[String],
        cwd: Option<&str>,
        environment: &[(String, OsString)],
    ) -> Result<Self, StartError> {
        let program = argv.first().filter(|program| !program.is_empty()).ok_or(StartError::Empty)?;
        if let Some(index) = argv.iter().position(|argument| argument.contains('\0')) {
            return Err(StartError::Nul(format!("`argv[{index}]`")));
        }
        if cwd.is_some_and(|cwd| cwd.contains('\0')) {
            return Err(StartError::Nul("`cwd`".to_owned()));
        }
        for (name, value) in environment {
            if name.is_empty() || name.contains(['=', '\0']) {
                return Err(StartError::Name(name.clone()));
            }
            if value.as_bytes().contains(&0) {
                return Err(StartError::Nul(format!("`env.{name}`")));
            }
        }
        let arguments: usize = argv.iter().map(|argument| argument.len() + 1).sum();
        let variables: usize = environment.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
        let path = environment.iter().rfind(|(name, _)| name == "PATH").map(|(_, path)| path.clone());
        Ok(Self {
            program: program.clone(),
            cwd: cwd.map(PathBuf::from),
            path: path.unwrap_or_default(),
            size: arguments + variables,
        })
    }

    /// Enters the folder, after looking for what is known to fail. For the account the command runs under.
    pub(super) fn enter(&self) -> Result<(), StartError> {
        self.check_cwd()?;
        let found = self.find()?;
        if !has_known_format(&found) {
            return Err(StartError::Format(found));
        }
        match &self.cwd {
            Some(cwd) => std::env::set_current_dir(cwd).map_err(|error| StartError::CwdDenied(cwd.clone(), error)),
            None => Ok(()),
        }
    }

    /// Turns the error of a start that was tried into one that says what to do.
    pub(super) fn explain(&self, error: io::Error) -> StartError {
        let program = self.program.clone();
        match error.kind() {
            ErrorKind::ArgumentListTooLong => StartError::TooLong(self.size),
            ErrorKind::NotFound => match self.check_cwd().and_then(|()| self.find()) {
                Ok(found) => StartError::Interpreter(found),
                Err(why) => why,
            },
            ErrorKind::PermissionDenied => match self.check_cwd().and_then(|()| self.find()) {
                Ok(found) => StartError::NotExecutable(found),
                Err(why) => why,
            },
            ErrorKind::WouldBlock | ErrorKind::OutOfMemory => StartError::Exhausted { program, error },
            _ => match rustix::io::Errno::from_io_error(&error) {
                Some(rustix::io::Errno::NOEXEC) => StartError::Format(self.find().unwrap_or(program.into())),
                Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE) => StartError::Exhausted { program, error },
                _ => StartError::Other { program, error },
            },
        }
    }

    fn check_cwd(&self) -> Result<(), StartError> {
        let Some(cwd) = self.cwd.clone() else {
            return Ok(());
        };
        match fs::metadata(&cwd) {
            Ok(meta) if !meta.is_dir() => Err(StartError::CwdNotDirectory(cwd)),
            Ok(_) => match access(&cwd, Access::EXEC_OK) {
                Ok(()) => Ok(()),
                Err(error) => Err(StartError::CwdDenied(cwd, error.into())),
            },
            Err(error) if error.kind() == ErrorKind::NotFound => Err(StartError::CwdMissing(cwd)),
            Err(error) if error.kind() == ErrorKind::NotADirectory => Err(StartError::CwdNotDirectory(cwd)),
            Err(error) => Err(StartError::CwdDenied(cwd, error)),
        }
    }

    /// Finds the program as `execvp` will: a name with a slash is a path below `cwd`, any other is looked for on PATH.
    fn find(&self) -> Result<PathBuf, StartError> {
        let here = self.cwd.clone().unwrap_or_default();
        if self.program.contains('/') {
            return executable(here.join(&self.program));
        }
        let mut denied = None;
        for folder in std::env::split_paths(&self.path) {
            match executable(here.join(folder).join(&self.program)) {
                Ok(found) => return Ok(found),
                Err(StartError::NotExecutable(file)) => denied = denied.or(Some(file)),
                Err(_) => {}
            }
        }
        Err(match denied {
            Some(file) => StartError::NotExecutable(file),
            None => StartError::NotOnPath {
                program: self.program.clone(),
                path: self.path.to_string_lossy().escape_debug().to_string(),
            },
        })
    }
}

fn executable(file: PathBuf) -> Result<PathBuf, StartError> {
    match fs::metadata(&file) {
        Ok(meta) if meta.is_dir() => Err(StartError::IsDirectory(file)),
        // To look into a named pipe would take until somebody writes to it.
        Ok(meta) if !meta.is_file() => Err(StartError::NotAFile(file)),
        Ok(_) if access(&file, Access::EXEC_OK).is_ok() => Ok(file),
        Ok(_) => Err(StartError::NotExecutable(file)),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Err(StartError::NotExecutable(file)),
        Err(_) => Err(StartError::Missing(file)),
    }
}

/// Whether the kernel will take the file. In doubt yes: what cannot be read, or anything where `binfmt_misc` is in use.
fn has_known_format(file: &Path) -> bool {
    let mut head = Vec::with_capacity(20);
    match File::open(file).map(|file| file.take(20).read_to_end(&mut head)) {
        Ok(Ok(_)) => {}
        _ => return true,
    }
    head.starts_with(b"#!") || is_native_elf(&head) || others_registered()
}

fn is_native_elf(head: &[u8]) -> bool {
    // e_machine: x86-64 also runs i386, AArch64 also runs ARM.
    let machines: &[u16] = match std::env::consts::ARCH {
        "x86_64" => &[62, 3],
        "aarch64" => &[183, 40],
        _ => &[],
    };
    let machine = head.get(18..20).and_then(|bytes| Some(u16::from_le_bytes(bytes.try_into().ok()?)));
    head.starts_with(b"\x7fELF") && machine.is_some_and(|it| machines.is_empty() || machines.contains(&it))
}

fn others_registered() -> bool {
    fs::read_dir("/proc/sys/fs/binfmt_misc").is_ok_and(|entries| {
        entries.flatten().any(|entry| !matches!(entry.file_name().to_str(), Some("register" | "status")))
    })
}
