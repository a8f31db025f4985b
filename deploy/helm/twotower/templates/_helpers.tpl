{{- define "twotower.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "twotower.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "twotower.labels" -}}
{{ include "twotower.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- /* "redis", or "" where events stay in a volume. */ -}}
{{- define "twotower.shared" -}}
{{- if or .Values.events.redis .Values.events.existingSecret }}redis{{ end }}
{{- end }}

{{- define "twotower.check" -}}
{{- if not .Values.bundle.volume }}{{ fail "bundle.volume is empty. Give a volume that holds the bundle, such as {persistentVolumeClaim: {claimName: bundles}}." }}{{ end }}
{{- if not (or .Values.keys.existingSecret .Values.public) }}{{ fail "keys.existingSecret is empty: no client could read. Give a secret with the entry api.keys, or set public to true." }}{{ end }}
{{- if and .Values.keys.trustedKey (not .Values.keys.existingSecret) }}{{ fail "keys.trustedKey is true, but keys.existingSecret is empty. Put bundle.pub into a secret and name it." }}{{ end }}
{{- if and .Values.events.redis .Values.events.existingSecret }}{{ fail "events.redis and events.existingSecret are both given. Give one of them." }}{{ end }}
{{- if not (include "twotower.shared" .) }}
{{- if or .Values.autoscaling.enabled (gt (int .Values.replicas) 1) }}{{ fail "Several replicas need Redis for their events. Set events.redis or events.existingSecret, or replicas to 1." }}{{ end }}
{{- if not .Values.events.volume }}{{ fail "events.volume is empty, so accepted events would be lost with the pod. Set events.redis, events.existingSecret, or events.volume; {emptyDir: {}} if they may be lost." }}{{ end }}
{{- end }}
{{- end }}
