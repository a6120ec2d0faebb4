//! A browser without a window, driven over WebDriver, which is a dozen requests of JSON.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use serde_json::{Value, json};

use crate::support::{eventually, skipped};

/// Longest that anything on a page may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A browser with one page. It is gone when this is dropped.
pub struct Browser {
    driver: Child,
    port: u16,
    session: String,
    http: reqwest::Client,
}

impl Browser {
    /// Starts one that shows `url`; `None`, said loudly, where none is installed.
    pub async fn open(url: &str) -> Option<Self> {
        let started = Command::new("chromedriver").arg("--port=0").stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let Ok(mut driver) = started else {
            skipped("chromedriver is not installed (Debian: apt install chromium-driver)");
            return None;
        };
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port =
            lines.find_map(|line| line.ok()?.split("successfully on port ").nth(1)?.trim_end_matches('.').parse().ok());
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let mut browser = Self { driver, port: port.expect("chromedriver starts"), session: String::new(), http };
        // Its own sandbox needs an account other than root; what is shown here is our own.
        // Nor is it to speak with anybody else.
        let args = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ];
        // A check of a long page takes its time where the machine does other things too: half a minute is a driver's own patience.
        let patience = json!({"script": 180_000});
        let wanted =
            json!({"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"args": args}, "timeouts": patience}}});
        let made = browser.call("", wanted).await;
        browser.session = made["sessionId"].as_str().unwrap().to_owned();
        browser.resize(1280, 900).await;
        browser.call("/url", json!({"url": url})).await;
        Some(browser)
    }

    async fn call(&self, path: &str, body: Value) -> Value {
        let session = if self.session.is_empty() { String::new() } else { format!("/{}", self.session) };
        let url = format!("http://127.0.0.1:{}/session{session}{path}", self.port);
        let answer: Value = self.http.post(url).json(&body).send().await.unwrap().json().await.unwrap();
        assert!(answer["value"]["error"].is_null(), "{path}: {}", answer["value"]);
        answer["value"].clone()
    }

    /// Gives the page this size, in pixels.
    pub async fn resize(&self, width: u32, height: u32) {
        let params = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.call("/goog/cdp/execute", json!({"cmd": "Emulation.setDeviceMetricsOverride", "params": params})).await;
    }

    /// What `script`, the body of a function, returns.
    pub async fn run(&self, script: &str) -> Value {
        self.call("/execute/sync", json!({"script": script, "args": []})).await
    }

    /// Goes to a screen.
    pub async fn go(&self, hash: &str) {
        self.run(&format!("location.hash = {}", json!(hash))).await;
    }

    /// Goes to a screen, and waits until it is there.
    pub async fn reach(&self, hash: &str) {
        self.go(hash).await;
        self.until("document.querySelector('main h1, main .why') && !document.querySelector('.loading')").await;
    }

    /// Waits until the expression is true.
    pub async fn until(&self, expression: &str) {
        let script = format!("return Boolean({expression})");
        let what = format!("{expression}, in the page");
        eventually(&what, LIMIT, || async { (self.run(&script).await == true).then_some(()) }).await;
    }

    /// Waits until the page has `text` in sight.
    pub async fn sees(&self, text: &str) {
        self.until(&format!("document.body.innerText.includes({})", json!(text))).await;
    }

    /// Clicks the first element that matches and can be clicked, as soon as there is one.
    pub async fn click(&self, selector: &str) {
        let found = format!("document.querySelector({})", json!(selector));
        self.until(&format!("{found} && !{found}.disabled && ({found}.click(), true)")).await;
    }

    /// Presses keys, one after the other.
    pub async fn press(&self, keys: &str) {
        let each = |key: char| [json!({"type": "keyDown", "value": key}), json!({"type": "keyUp", "value": key})];
        let actions: Vec<Value> = keys.chars().flat_map(each).collect();
        self.call("/actions", json!({"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})).await;
    }

    /// Writes `text` into the first field that matches, as soon as there is one.
    pub async fn fill(&self, selector: &str, text: &str) {
        let found = format!("document.querySelector({})", json!(selector));
        self.until(&found).await;
        self.run(&format!(
            "const field = {found}; field.value = {}; field.dispatchEvent(new Event('input'))",
            json!(text)
        ))
        .await;
    }

    /// Writes what is in sight into a file.
    pub async fn picture(&self, file: &Path) {
        let url = format!("http://127.0.0.1:{}/session/{}/screenshot", self.port, self.session);
        let answer: Value = self.http.get(url).send().await.unwrap().json().await.unwrap();
        let png = base64::engine::general_purpose::STANDARD.decode(answer["value"].as_str().unwrap()).unwrap();
        std::fs::write(file, png).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The driver ends the browser only when it is told to.
        if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port)) {
            let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
            let head =
                format!("DELETE /session/{} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", self.session);
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.read_to_end(&mut Vec::new());
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
