-- The hook `keylatch`: checks a request with the sidecar. Needs Apache >= 2.4.57 and LuaSocket.
--
-- Every error in this file is 503, and only allowed requests pass `keylatch_closes`. A hook always
-- returns a number: after anything else mod_lua never uses this Lua state again, and requests that
-- wait for a state wait forever.

local socket = require "socket"
local unix = require "socket.unix"

-- An address, not a name: LuaSocket resolves names without a timeout.
local SIDECAR = "127.0.0.1:8700" -- or: "/run/keylatch/keylatch.sock"

-- The permission that a request needs; FULL for every request that is not listed. Method and raw path
-- are compared exactly, so another spelling of a path (/v1/./emails, //v1/emails, %2e) needs FULL.
local PERMISSIONS = {
    ["POST /v1/emails"] = "SENDING",
    ["POST /v1/emails/batch"] = "SENDING",
}

-- Public: raw paths too.
local PUBLIC = {
    ["/healthz"] = true,
}

local PATIENCE_SECONDS = 1 -- the sidecar answers within 0.8 s; LuaSocket's default is 60 s

local IDENTITY = {
    "x-keylatch-key-id",
    "x-keylatch-key-name",
    "x-keylatch-organization-id",
    "x-keylatch-permission",
    "x-keylatch-environment",
}
local OF_REFUSALS = {"cache-control", "x-keylatch-error", "www-authenticate", "retry-after"}
local REFUSED = {[401] = true, [403] = true, [429] = true}

-- Headers that the client must not set. The permission depends on the method, so no header may make
-- the app use another one. The app does not get the key, so it cannot log or leak it; delete its line
-- if the app checks keys itself or uses the header for something else.
local NOT_THE_CLIENTS = {
    ["authorization"] = true,
    ["x-http-method"] = true,
    ["x-http-method-override"] = true,
    ["x-method-override"] = true,
    ["x-forwarded-for"] = true,
    ["x-forwarded-host"] = true,
    ["x-forwarded-proto"] = true,
    ["x-forwarded-server"] = true,
}

local ALLOWED = {}
local UNAVAILABLE = {
    status = 503,
    fields = {
        ["content-type"] = "application/json",
        ["cache-control"] = "no-store",
        ["x-keylatch-error"] = "unavailable",
        ["retry-after"] = "1",
    },
    body = '{"error":"unavailable","error_description":'
        .. '"The API key could not be checked; try again in a moment"}',
}

local kept -- this Lua state's idle connection to the sidecar

local function wait_until(deadline, connection)
    connection:settimeout(math.max(0, deadline - socket.gettime()), "t")
end

local function closing(connection) -- LuaSocket's `try`: an error also closes the connection
    return socket.newtry(function() connection:close() end)
end

local dial = socket.protect(function(deadline)
    local host, port = SIDECAR:match("^(.*):(%d+)$")
    local connection = host and socket.tcp() or unix.stream()
    local try = closing(connection)
    wait_until(deadline, connection)
    try(connection:connect(host or SIDECAR, port))
    return connection
end)

-- Keeps the connection only after a response that was read to its end: the rest of one would be read
-- as the response to another client's request.
local exchange = socket.protect(function(connection, question, deadline)
    local try = closing(connection)
    local function read(what)
        wait_until(deadline, connection)
        return try(connection:receive(what))
    end
    wait_until(deadline, connection)
    try(connection:send(question))
    local status = try(read("*l"):match("^HTTP/1%.1 (%d%d%d) "), "no HTTP")
    local fields = {}
    for line in read, "*l" do
        if line == "" then
            break
        end
        local name, value = line:match("^([^%s:]+):%s*(.-)%s*$")
        try(name and not fields[name:lower()], "a header that is broken or comes twice")
        fields[name:lower()] = value
    end
    local length = try((fields["content-length"] or ""):match("^%d+$"), "no length")
    local body = length:match("[1-9]") and read(tonumber(length)) or ""
    kept = connection
    return {status = tonumber(status), fields = fields, body = body}
end)

local function is_idle(connection) -- neither closed by the sidecar, nor with unexpected bytes
    wait_until(0, connection)
    local _, fault = connection:receive(1)
    return fault == "timeout"
end

local function ask(question)
    local deadline = socket.gettime() + PATIENCE_SECONDS
    local old = kept
    kept = nil
    if old and is_idle(old) then
        local answer, fault = exchange(old, question, deadline)
        if answer or fault == "timeout" then
            return answer, fault
        end -- closed during the request: retry on a new one
    elseif old then
        old:close()
    end
    local connection, fault = dial(deadline)
    if not connection then
        return nil, fault
    end
    return exchange(connection, question, deadline)
end

local function question_about(r, path, authorization)
    local permission = PERMISSIONS[r.method .. " " .. path] or "FULL"
    local lines = {
        "GET /verify?permission=" .. permission .. " HTTP/1.1",
        "Host: keylatch",
        "X-Forwarded-Method: " .. r.method, -- for KEYLATCH_VERIFY_REQUEST=forwarded
        "X-Forwarded-Uri: " .. r.unparsed_uri,
    }
    if authorization then -- Apache joins two with a comma, which the sidecar refuses
        lines[#lines + 1] = "Authorization: " .. authorization
    end
    return table.concat(lines, "\r\n") .. "\r\n\r\n"
end

-- Many apps read X_Keylatch_Key_Id as X-Keylatch-Key-Id, so every spelling is removed. Not with
-- mod_headers: it has no patterns.
local function clean(r)
    for name in pairs(r:headers_in_table()) do
        local folded = name:lower():gsub("[^a-z0-9]", "-")
        if folded:match("^x%-keylatch") or NOT_THE_CLIENTS[folded] then
            r.headers_in[name] = nil
        end
    end
    r.headers_in["X-Forwarded-Proto"] = r.is_https and "https" or "http"
end

-- Only the options for the client's own connection remain in `Connection`. mod_proxy removes the
-- headers that it names: `Connection: X-Keylatch-Key-Id` would make an allowed request anonymous.
local function clean_connection(r)
    local tokens = {}
    for token in (r.headers_in["Connection"] or ""):lower():gmatch("[^%s,]+") do
        if token == "close" or token == "keep-alive" then
            tokens[#tokens + 1] = token
        end
    end
    if (r.headers_in["Upgrade"] or ""):lower() == "websocket" then
        tokens[#tokens + 1] = "upgrade"
    else
        r.headers_in["Upgrade"] = nil
    end
    r.headers_in["Connection"] = tokens[1] and table.concat(tokens, ", ")
end

-- A CORS preflight request has no key: the app answers it.
local function is_preflight(r)
    return r.method == "OPTIONS"
        and (r.headers_in["Origin"] or ""):match("^[^ ]+$")
        and (r.headers_in["Access-Control-Request-Method"] or ""):match("^[^ ]+$")
end

local function judge(r)
    local path = r.unparsed_uri:match("^[^?]*")
    local authorization = r.headers_in["Authorization"]
    clean(r)
    clean_connection(r)
    if PUBLIC[path] or is_preflight(r) then
        return ALLOWED
    end
    local answer, fault = ask(question_about(r, path, authorization))
    if not answer then
        error("the sidecar does not answer: " .. fault, 0)
    end
    if REFUSED[answer.status] and answer.fields["x-keylatch-error"] then
        return answer
    end
    assert(answer.status == 200, "the sidecar says neither yes nor no")
    for _, name in ipairs(IDENTITY) do
        r.headers_in[name] = assert(answer.fields[name], "that 200 is not keylatch's")
    end
    return ALLOWED
end

local function refuse(r, refusal) -- not by ErrorDocument, which has no headers
    r.status = refusal.status
    r.content_type = refusal.fields["content-type"] or "application/json"
    for _, name in ipairs(OF_REFUSALS) do
        r.err_headers_out[name] = refusal.fields[name]
    end
    r:puts(refusal.body)
    return apache2.DONE
end

function keylatch(r)
    local came_to_an_end, verdict = pcall(judge, r)
    if came_to_an_end and verdict == ALLOWED then
        r.notes["keylatch"] = "allowed"
        return apache2.DECLINED -- declined: other hooks may still refuse
    end
    if not came_to_an_end then
        r:err("refused with 503: " .. tostring(verdict))
        verdict = UNAVAILABLE
    end
    return refuse(r, verdict)
end

-- Apache does not run the first hook for every request: not for an `ErrorDocument` that is a path of
-- the app, and `Satisfy Any` ignores its result.
function keylatch_closes(r)
    if r.notes["keylatch"] == "allowed" then
        return apache2.DECLINED
    end
    r:err("refused with 500: keylatch was not asked, or not listened to")
    return 500
end
